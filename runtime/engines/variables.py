"""What tells the plug-in what to do: variables of the environment, and a load format."""

PLAN, STRICT, BAND = "SEMMOE_PLAN", "SEMMOE_STRICT", "SEMMOE_BAND"
RECORD, RECORD_SHARE = "SEMMOE_RECORD", "SEMMOE_RECORD_SHARE"
LOAD_FORMAT = "semmoe"
HELD = "_semmoe_plan"  # attribute of a model in a worker: the plan whose labels its weights carry
REPLAN = "semmoe_replan"  # method of a worker, as collective_rpc names it
