"""Data of kind images: a folder of images."""

from distill.data import KindLoader, captions
from distill.data.images import ImageData
from distill.data.index import FoundImages, ImageIndex
from distill.data.indexed import IndexedImages
from distill.data.rows import FileRows
from distill.spec import imagefolder
from distill.spec.dataspec import ImagesData


def found(spec: ImagesData, known: ImageIndex | None) -> FoundImages:
    """The images of a folder with their class ids or captions. Captions that `known` has are not read again."""
    folder = imagefolder.read(spec.path, captions=spec.captions, split=spec.split)
    rows = FileRows(folder.root, len(folder.names), folder.names.__getitem__)
    texts = captions.of_folder(folder, known)
    return FoundImages(rows, folder.names, folder.stats, folder.labels, folder.num_classes, captions=texts)


def rows(spec: ImagesData, known: ImageIndex) -> FileRows:
    """The rows of an indexed folder; the names come from the index."""
    return FileRows(spec.folder, len(known), known.name)


LOADER: KindLoader[ImagesData] = IndexedImages(found, rows, ImageData)
