"""One lazy `Checkpoint` for every kind of source, the `Model` in it, and a writer that leaves no bad file."""

from blockmerge.checkpoints.alone import COMPONENT_WORDS, lone_model, only_component
from blockmerge.checkpoints.assembled import Assembled, Assembly, Piece
from blockmerge.checkpoints.checkpoint import Checkpoint, Checksummed, Makes, Reader, TensorInfo
from blockmerge.checkpoints.formats.any_file import SUFFIXES
from blockmerge.checkpoints.formats.file import FileReader, no_garbage_collection
from blockmerge.checkpoints.formats.folder import (
    LARGEST_CARRIED,
    SCHEDULER,
    DiffusersFolder,
    carried_without_weights,
    is_diffusers_folder,
    model_files,
)
from blockmerge.checkpoints.formats.safetensors_file import SafetensorsFile, encode_header
from blockmerge.checkpoints.formats.torch_file import TorchFile
from blockmerge.checkpoints.hashes import Hashes, hash_file, old_hash
from blockmerge.checkpoints.hub import followed, in_cache, name_of
from blockmerge.checkpoints.identity import Identity, identity_of, size_of_files
from blockmerge.checkpoints.known_hashes import sha256_of
from blockmerge.checkpoints.metadata import faulty_metadata
from blockmerge.checkpoints.model import (
    EMA_CHOICES,
    VAE_PREFIX,
    Model,
    anatomy_of,
    made,
    other_kind_of,
    recognised,
    vae_tensors,
)
from blockmerge.checkpoints.named import Unreadable, single_models, stands_for_several
from blockmerge.checkpoints.open import (
    CheckpointLike,
    check_variant,
    names_apart,
    open_checkpoint,
    open_source,
    told_apart,
)
from blockmerge.checkpoints.opening import Opening, names_of
from blockmerge.checkpoints.position_ids import embedding_of, fault_of_position_ids, positions_beside
from blockmerge.checkpoints.prediction import ToldPrediction, prediction_of_scheduler, told_prediction
from blockmerge.checkpoints.quantised import QUANTISATION_KEY, SCALED_FP8, Quantised, quantised
from blockmerge.checkpoints.reading import Readers, read
from blockmerge.checkpoints.state_dict import StateDict, state_dict_name
from blockmerge.checkpoints.writing.disk import check_space
from blockmerge.checkpoints.writing.folder_writer import AtomicFolder, check_output_folder
from blockmerge.checkpoints.writing.writer import AtomicFile, check_output

__all__ = [
    "COMPONENT_WORDS",
    "EMA_CHOICES",
    "LARGEST_CARRIED",
    "QUANTISATION_KEY",
    "SCALED_FP8",
    "SCHEDULER",
    "SUFFIXES",
    "VAE_PREFIX",
    "Assembled",
    "Assembly",
    "AtomicFile",
    "AtomicFolder",
    "Checkpoint",
    "CheckpointLike",
    "Checksummed",
    "DiffusersFolder",
    "FileReader",
    "Hashes",
    "Identity",
    "Makes",
    "Model",
    "Opening",
    "Piece",
    "Quantised",
    "Reader",
    "Readers",
    "SafetensorsFile",
    "StateDict",
    "TensorInfo",
    "ToldPrediction",
    "TorchFile",
    "Unreadable",
    "anatomy_of",
    "carried_without_weights",
    "check_output",
    "check_output_folder",
    "check_space",
    "check_variant",
    "embedding_of",
    "encode_header",
    "fault_of_position_ids",
    "faulty_metadata",
    "followed",
    "hash_file",
    "identity_of",
    "in_cache",
    "is_diffusers_folder",
    "lone_model",
    "made",
    "model_files",
    "name_of",
    "names_apart",
    "names_of",
    "no_garbage_collection",
    "old_hash",
    "only_component",
    "open_checkpoint",
    "open_source",
    "other_kind_of",
    "positions_beside",
    "prediction_of_scheduler",
    "quantised",
    "read",
    "recognised",
    "sha256_of",
    "single_models",
    "size_of_files",
    "stands_for_several",
    "state_dict_name",
    "told_apart",
    "told_prediction",
    "vae_tensors",
]
