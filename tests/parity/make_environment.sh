#!/bin/sh
# Make the torch oracles' environment: make_environment.sh [FOLDER], default .venv-parity. Safe to run again.
#
# It is apart from the repository's own environment: torch is never imported beside jax. Python 3.11 is looked for
# first; PARITY_PYTHON names another interpreter. A CPU build of torch is enough: where the package index gives a CUDA
# build by default, set PIP_INDEX_URL to one with CPU builds.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
folder=${1:-.venv-parity}
requirements="$here/requirements.txt"

if [ -f "$folder/requirements.txt" ] && cmp -s "$requirements" "$folder/requirements.txt"; then
    exit 0
fi

python=""
newest_pyenv_311=$(pyenv versions --bare 2>/dev/null | grep '^3\.11\.' | tail -n 1 || true)
for candidate in ${PARITY_PYTHON:-} "$(pyenv prefix "$newest_pyenv_311" 2>/dev/null || true)/bin/python3.11" \
    python3.11 python3.12 python3.13; do
    if "$candidate" -c 'import ensurepip, venv' >/dev/null 2>&1; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    echo "make_environment.sh: no Python 3.11, 3.12 or 3.13 with venv: the torch oracles: install one," \
        "or set PARITY_PYTHON" >&2
    exit 2
fi

echo "make_environment.sh: $("$python" --version) -> $folder"
rm -rf "$folder"
"$python" -m venv "$folder"
# gpt-oss declares a newer Python and the dependencies of its tools; only its torch model is used here.
gpt_oss=$(grep '^gpt-oss==' "$requirements")
grep -v '^gpt-oss==' "$requirements" >"$folder/others.txt"
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check -r "$folder/others.txt"
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --ignore-requires-python "$gpt_oss"
"$folder/bin/python" -c 'import gpt_oss.torch.model, transformers'
cp "$requirements" "$folder/requirements.txt"  # written last: an interrupted run is made again
