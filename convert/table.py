"""Tables as the commands print them: the first column to the left, the others to the right."""


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a table, indented by two.

    Example:
        >>> table(["group", "bytes"], [["router", "12"]])
        ['  group   bytes', '  router     12']
    """
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = []
    for first, *rest in [header, *rows]:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))]
        lines.append("  " + "  ".join(cells))
    return lines
