"""One lazy `Checkpoint` for every kind of source, and the writer that never leaves a bad file."""

from blockmerge.checkpoints.checkpoint import Checkpoint, Reader, TensorInfo
from blockmerge.checkpoints.disk import check_space
from blockmerge.checkpoints.dtypes import FLOAT_DTYPES, itemsize
from blockmerge.checkpoints.folder import DiffusersFolder, is_diffusers_folder
from blockmerge.checkpoints.folder_writer import AtomicFolder, check_output_folder
from blockmerge.checkpoints.hashes import Hashes, hash_file, old_hash
from blockmerge.checkpoints.model import VAE_PREFIX, Model, vae_tensors
from blockmerge.checkpoints.open import CheckpointLike, open_checkpoint
from blockmerge.checkpoints.safetensors_file import SafetensorsFile, encode_header
from blockmerge.checkpoints.state_dict import StateDict
from blockmerge.checkpoints.writer import AtomicFile, check_output

__all__ = [
    "FLOAT_DTYPES",
    "VAE_PREFIX",
    "AtomicFile",
    "AtomicFolder",
    "Checkpoint",
    "CheckpointLike",
    "DiffusersFolder",
    "Hashes",
    "Model",
    "Reader",
    "SafetensorsFile",
    "StateDict",
    "TensorInfo",
    "check_output",
    "check_output_folder",
    "check_space",
    "encode_header",
    "hash_file",
    "is_diffusers_folder",
    "itemsize",
    "old_hash",
    "open_checkpoint",
    "vae_tensors",
]
