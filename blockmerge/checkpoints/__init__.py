"""One lazy `Checkpoint` for every kind of source, and the writer that never leaves a bad file."""

from blockmerge.checkpoints.assembled import Assembled, Assembly, Piece
from blockmerge.checkpoints.checkpoint import Checkpoint, Reader, TensorInfo
from blockmerge.checkpoints.dtypes import FLOAT_DTYPES, itemsize
from blockmerge.checkpoints.hashes import Hashes, hash_file, old_hash
from blockmerge.checkpoints.model import VAE_PREFIX, Model, vae_tensors
from blockmerge.checkpoints.open import SUFFIXES, CheckpointLike, open_checkpoint
from blockmerge.checkpoints.safetensors_file import SafetensorsFile, encode_header
from blockmerge.checkpoints.state_dict import StateDict
from blockmerge.checkpoints.torch_file import TorchFile
from blockmerge.checkpoints.writer import AtomicFile, check_output, check_space

__all__ = [
    "FLOAT_DTYPES",
    "SUFFIXES",
    "VAE_PREFIX",
    "Assembled",
    "Assembly",
    "AtomicFile",
    "Checkpoint",
    "CheckpointLike",
    "Hashes",
    "Model",
    "Piece",
    "Reader",
    "SafetensorsFile",
    "StateDict",
    "TensorInfo",
    "TorchFile",
    "check_output",
    "check_space",
    "encode_header",
    "hash_file",
    "itemsize",
    "old_hash",
    "open_checkpoint",
    "vae_tensors",
]
