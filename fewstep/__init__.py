"""fewstep: distil a pretrained diffusion model into a generator of one to four network calls."""

__version__ = "0.1.0"
