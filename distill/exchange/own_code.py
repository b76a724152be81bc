"""Names of the code in students that have the network class of a stock pipeline, where its classes are not enough.

A complete pipeline of a flow map has a pipeline class of its own, made from the stock one, and the embedding of t - s
as a component. A student whose times no scheduler of diffusers uses has a scheduler of its own.
"""

PIPELINE, FLOW_MAP = "flow_map_pipeline", "FlowMap"  # module, and what the name of its class has before the stock one's
SCHEDULER = ("linear_path_scheduler", "LinearPathScheduler")
SECOND_TIME = ("second_time", "SecondTime")
COMPONENTS = {"scheduler": SCHEDULER, "second_time": SECOND_TIME}  # folder -> module in it, and class
FILES = (f"{PIPELINE}.py", *(f"{folder}/{module}.py" for folder, (module, _) in COMPONENTS.items()))


def stock_class(named: object) -> str:
    """The pipeline class of diffusers that `_class_name` in a model_index.json stands for; empty if it is none."""
    match named:
        case str():
            return named
        case [str(module), str(own)] if module == PIPELINE and own.startswith(FLOW_MAP):
            return own.removeprefix(FLOW_MAP)
    return ""
