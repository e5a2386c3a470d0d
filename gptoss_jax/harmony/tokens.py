"""The ids of o200k_harmony's special tokens (openai/harmony src/encoding.rs)."""

START_OF_TEXT = 199998
END_OF_TEXT = 199999
RETURN = 200002
CONSTRAIN = 200003
CHANNEL = 200005
START = 200006
END = 200007
MESSAGE = 200008
CALL = 200012

STOP_IDS = (RETURN, CALL, END_OF_TEXT)
"""Where an assistant's turn ends: an answer is complete, a tool is called, or (outside the format) a text is over."""
