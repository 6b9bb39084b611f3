"""Published ways of scoring text-to-image models, by name: how many samples, at what size, seen how.

Knows extractors and references; knows nothing about models. A new protocol is an entry of `PROTOCOLS`.
"""

from __future__ import annotations

from dataclasses import dataclass

from fewstep.evaluate import EvaluationError, Reference, find_reference
from fewstep.features import Extractor, Framed

__all__ = ["PROTOCOLS", "Protocol", "find_protocol"]


@dataclass(frozen=True)
class Protocol:
    """How a published table was made.

    Attributes:
        name: what to type.
        samples: images, one a caption.
        side: pixels; real and generated images are cropped to their central square and resized to it (PIL, Lanczos).
        patch: whether patch FID is measured as well.
        about: where it is from, and what it needs.
    """

    name: str
    samples: int
    side: int
    patch: bool
    about: str

    def frame(self, extractor: Extractor) -> Extractor:
        """The extractor as this protocol uses it: clean-fid's resizing."""
        return Framed(extractor, "clean")

    def patches(self, reference: str, extractor: Extractor) -> tuple[Reference, Extractor] | None:
        """What patch FID is measured with, if the protocol has it.

        Raises:
            EvaluationError, DataError: the reference is statistics, not images, or cannot be read.
        """
        if not self.patch:
            return None
        if reference.endswith(".npz"):
            raise EvaluationError(
                f"{self.name} measures patches of the real images too, and {reference} holds statistics of whole ones: "
                "give the folder of images"
            )
        measure = Framed(extractor, "patch")
        return find_reference(reference, measure, (3, self.side, self.side), self.side), measure


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "coco-30k", 30_000, 256, False,
            "Zero-shot FID of SD1.5 as DMD (arXiv 2311.18828, section 4.4) and DMD2 (arXiv 2405.14867, section 5.3) report it: captions "
            "and images of COCO's val2014, 30,000 captions.",
        ),
        Protocol(
            "sdxl-10k", 10_000, 512, True,
            "FID, patch FID and CLIP score of SDXL as DMD2 reports them (arXiv 2405.14867, table 3): 10,000 captions and images of "
            "COCO's val2014; --clip is OpenCLIP ViT-G/14.",
        ),
    )
}  # fmt: skip


def find_protocol(name: str) -> Protocol:
    """A protocol by name.

    Raises:
        EvaluationError: no such one.
    """
    if name not in PROTOCOLS:
        raise EvaluationError(f"no protocol {name!r}: there are {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]
