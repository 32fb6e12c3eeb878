"""What tells the plug-in what to do: variables of the environment, and a load format."""

PLAN, STRICT, BAND = "SEMMOE_PLAN", "SEMMOE_STRICT", "SEMMOE_BAND"
RECORD, RECORD_SHARE = "SEMMOE_RECORD", "SEMMOE_RECORD_SHARE"
LOAD_FORMAT = "semmoe"
