"""Images and labels to train on and to compare with, loaded and checked; knows nothing of diffusion.

One file a kind of data. A spec (`FashionMNIST`, `ImageFolder`, ...) is what a recipe's `data:`
block holds; `spec.load()` gives an `ImageDataset`. Everything wrong with the data raises `DataError`. A record belongs
to the choices once it is imported here.
"""

from fewstep.data.buckets import Buckets, BucketStream, Draw
from fewstep.data.captions import Captioned, captioned_images
from fewstep.data.cifar10 import Cifar10
from fewstep.data.dataset import DataSpec, ImageDataset, shuffled_indices, to_uint8, to_unit
from fewstep.data.digits import Digits
from fewstep.data.edm2_latents import EDM2Latents
from fewstep.data.fashion_mnist import FashionMNIST
from fewstep.data.folders import ImageFolder
from fewstep.data.image_files import LazyImages
from fewstep.data.lmdb_images import LmdbDataset, TextLatents, text_latents
from fewstep.data.malformed import Malformed, Tolerance
from fewstep.data.prepared import Prepared
from fewstep.data.stream import Stream
from fewstep.data.text import CaptionRule
from fewstep.data.zips import ZipDataset

__all__ = [
    "BucketStream",
    "Buckets",
    "CaptionRule",
    "Captioned",
    "Cifar10",
    "DataSpec",
    "Digits",
    "Draw",
    "EDM2Latents",
    "FashionMNIST",
    "ImageDataset",
    "ImageFolder",
    "LazyImages",
    "LmdbDataset",
    "Malformed",
    "Prepared",
    "Stream",
    "TextLatents",
    "Tolerance",
    "ZipDataset",
    "captioned_images",
    "shuffled_indices",
    "text_latents",
    "to_uint8",
    "to_unit",
]
