"""Files that hold no tensors that can be read: what they are, told from how they begin."""

from __future__ import annotations

import codecs
import re

from blockmerge.errors import shown

HEAD = 4096
"""The bytes of a file's beginning that are looked at."""

_ITSELF = "download the model itself"
_WITH_TOKEN = f"{_ITSELF}, with a token where its site asks for one"
_LOCKED = (
    r"access|authori|authenti|credential|denied|forbidden|gated|log ?in|password|restricted|sign ?in|token"
)
"""What of an answer tells that its site asks for one."""
_TOML = r"(#[^\n]*\n\s*)*(\[[\w-]+\][ \t]*(#[^\n]*)?[\r\n]|[\w-]+ *= *[\[\"'{\d])"
_FETCH = "fetch that with git lfs pull"
_FOLDER = "give the folder it lies in"
_UNPACK = "unpack it, and give the model that is in it"
_QUOTED = 100

_BINARY = (
    (rb"GGUF", "a GGUF file, which blockmerge cannot read yet", "give the original .safetensors file"),
    (
        rb"lmgg|tjgg|fmgg",
        "a GGML file, not a model that can be merged",
        "give the original .safetensors file",
    ),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive, not a model", _UNPACK),
    (rb"Rar!\x1a\x07", "a RAR archive, not a model", _UNPACK),
    (rb"PK\x05\x06", "an empty zip archive, not a model", _ITSELF),
    (rb"PK\x07\x08", "one part of a zip archive, not a model", _UNPACK),
    (rb"\x1f\x8b", "a gzip archive, not a model", _UNPACK),
    (rb"BZh[1-9]1AY&SY", "a bzip2 archive, not a model", _UNPACK),
    (rb"\xfd7zXZ\0", "an xz archive, not a model", _UNPACK),
    (rb"\x28\xb5\x2f\xfd", "a Zstandard archive, not a model", _UNPACK),
    (rb"\x04\x22\x4d\x18", "an LZ4 archive, not a model", _UNPACK),
    (
        rb".{257}ustar",
        "a tar archive, not a model",
        f"{_UNPACK}, or save it anew with torch if torch wrote it",
    ),
    (rb"\0{16}", "broken off, and begins with nothing but zeros", "download it again"),
    (rb"\x89PNG\r\n", "a PNG picture, not a model", _ITSELF),
    (rb"\xff\xd8\xff", "a JPEG picture, not a model", _ITSELF),
    (rb"GIF8[79]a", "a GIF picture, not a model", _ITSELF),
    (rb"RIFF.{4}WEBP", "a WebP picture, not a model", _ITSELF),
    (rb"BM.{4}\0{4}", "a BMP picture, not a model", _ITSELF),
    (rb"II\x2a\0|MM\0\x2a", "a TIFF picture, not a model", _ITSELF),
    (rb".{4}ftyp(avif|heic|mif1)", "a picture (AVIF or HEIC), not a model", _ITSELF),
    (rb".{4}ftyp|\x1a\x45\xdf\xa3|RIFF.{4}AVI ", "a video, not a model", _ITSELF),
    (rb"%PDF-", "a PDF document, not a model", _ITSELF),
    (
        rb"MZ.{58}",
        "a program for Windows, not a model",
        "do not run it, and get the model from its makers",
    ),
    (rb"\x7fELF", "a program for Linux, not a model", "do not run it, and get the model from its makers"),
    (
        rb"[\xce\xcf]\xfa\xed\xfe|\xca\xfe\xba\xbe",
        "a program for macOS, not a model",
        "do not run it, and get the model from its makers",
    ),
    (
        rb"\x00\x05\x16\x07",
        "what macOS keeps beside a file, not a model",
        "give the file without ._ before its name",
    ),
    (
        rb"\x4c\0\0\0\x01\x14\x02\0",
        "a shortcut of Windows, not a model",
        "give the file that it leads to",
    ),
    (
        rb"d\d+:(announce|created|comment|info|piece)",
        "a torrent, not a model",
        "download what it stands for",
    ),
    (
        rb"\x89HDF\r\n",
        "an HDF5 file (Keras), not a model that can be merged",
        "convert it to .safetensors",
    ),
    (rb"\x93NUMPY", "a NumPy array, not a model", _ITSELF),
    (rb"SQLite format 3\0", "an SQLite database, not a model", _ITSELF),
    (
        rb".{4}TFL3",
        "a TensorFlow Lite model, not one that can be merged",
        "give the original .safetensors file",
    ),
    (
        rb"\x08[\x01-\x14]\x12.{1,2}(pytorch|onnx|skl2onnx|tf2onnx)|ftrt",
        "an ONNX or TensorRT model, not one that can be merged",
        "give the original .safetensors file",
    ),
    (
        rb"[\x81-\x8f][\xa1-\xbf][a-z_]{2}",
        "a Flax model (msgpack), not one that can be merged",
        "convert it to .safetensors",
    ),
)
"""How files begin (patterns), and what is said of them."""

_TEXTS = (
    (r"version https://git-lfs", "a git-LFS pointer, not the model itself", False, _FETCH),
    (r"(<!--.*?-->\s*)*<(!doctype|html|head|body|title)", "an HTML page, not a model", False, _ITSELF),
    (r"\{.*\"weight_map\"", "the list of a model's shards, not a model", False, _FOLDER),
    (r"\{.*\"_diffusers_version\"", "a config of diffusers, not a model", False, _FOLDER),
    (r"\{.*\"(architectures|model_type|transformers_version)\"", "a config, not a model", False, _FOLDER),
    (_TOML, "a TOML text, not a model", False, "a recipe is for blockmerge run"),
    (r"[{\[]", "a JSON text, not a model", True, _ITSELF),
    (r"<\?xml|<\w+>", "an XML text, not a model", True, _ITSELF),
    (r"", "a text, not a model", True, _ITSELF),
)  # fmt: skip
"""The same of texts, without blanks before them, and whether the text is quoted."""

_SAID = (
    r"<title[^>]*>(.*?)</title>",
    r"<message>(.*?)</message>",
    r'"(?:error|message|detail)"\s*:\s*"([^"]+)"',
)
"""What of a page or an answer is quoted before all else."""


def other_file(head: bytes) -> str | None:
    """Say what a file is that begins with `head` (up to HEAD bytes), and what to do; None where that is
    unknown.

    >>> other_file(b"7z\\xbc\\xaf\\x27\\x1c")
    'is a 7z archive, not a model: unpack it, and give the model that is in it'
    """
    if not head:
        return "is empty: download it again"
    for sign, what, todo in _BINARY:
        if re.match(sign, head, re.DOTALL):
            return f"is {what}: {todo}"
    text = _text(head)
    if text is None:
        return None
    if not text:
        return f"is a blank text, not a model: {_ITSELF}"
    flags = re.IGNORECASE | re.DOTALL
    _, what, is_quoted, todo = next(row for row in _TEXTS if re.match(row[0], text, flags))
    found = (re.search(said, text, flags) for said in _SAID)
    quoted = next((match[1] for match in found if match), text if is_quoted else None)
    says = "" if quoted is None else f', and says "{shown(" ".join(quoted.split()), _QUOTED)}"'
    if is_quoted and re.search(_LOCKED, text, flags):
        todo = _WITH_TOKEN
    return f"is {what}{says}: {todo}"


def _text(head: bytes) -> str | None:
    """The text that a file begins with, without blanks before it; None where it is none."""
    encoding = "utf-16" if head[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        # A letter of several bytes may be cut at the end.
        text = codecs.getincrementaldecoder(encoding)().decode(head).strip()
    except UnicodeDecodeError:
        return None
    return text if all(letter.isprintable() or letter.isspace() for letter in text) else None
