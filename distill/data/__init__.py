"""Real data: `load` a set, and read it as a stream of batches through `DataSource`."""

from distill.data import arrays
from distill.data.source import DataSet, DataSource
from distill.spec import DataSpec, DigitsData, HfData, ImagesData, MnistData

__all__ = ["DataSet", "DataSource", "load"]


def load(spec: DataSpec, seed: int, *, keep: bool = True) -> DataSet | None:
    """The data set of a spec, None for kind none. `seed` keys random crops and flips.

    keep: hold a decoded set for the life of the process, so that the next load of the same has it at once.
    """
    match spec:
        case DigitsData():
            return arrays.digits()
        case MnistData():
            return arrays.mnist()
        case ImagesData() | HfData():
            from distill.data import folders  # here: the datasets library takes a second to import

            if isinstance(spec, ImagesData):
                return folders.images(spec, seed, keep)
            return folders.hugging_face(spec, seed, keep)
    return None
