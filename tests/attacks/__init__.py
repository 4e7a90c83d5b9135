"""Hostile model files, one function for each. Those that would run something only ever create the file
`canary`.

Over 500 lines, since it is one list of small files that tests take whole.
"""

from __future__ import annotations

import io
import struct
import zipfile

PICKLES = {}
"""Hostile pickles, to be put into a torch file of either layout: name → (what makes it, given a canary; the
words of its refusal).
"""

RUNNING = {}
"""Those of the pickles that Python's own unpickler would run: name → what makes it."""

FILES = {}
"""Hostile files: name → (what makes it; the words of its refusal)."""


def pickle(*says):
    return _register(PICKLES, says)


def running(*says):
    def register(function):
        RUNNING[function.__name__] = function
        return _register(PICKLES, says)(function)

    return register


def file(*says):
    return _register(FILES, says)


def _register(table, says):
    def register(function):
        table[function.__name__] = function, says
        return function

    return register


# How pickles and files are put together


def text(value):
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def integer(value):
    return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)


def named(module, name):
    return f"c{module}\n{name}\n".encode()


def called(module, name, *arguments):
    return named(module, name) + b"(" + b"".join(arguments) + b"tR"


def proto(*parts, version=2):
    return b"\x80" + bytes([version]) + b"".join(parts) + b"."


def storage(key="0", kind="FloatStorage", elements=4, more=b""):
    """A reference to a storage; in a stream `more` says of what it is a view, as a rule None."""
    return (
        b"("
        + text("storage")
        + named("torch", kind)
        + text(key)
        + text("cpu")
        + integer(elements)
        + more
        + b"tQ"
    )


def tensor(offset=0, shape=(4,), strides=(1,), stored=None):
    axes = [b"(" + b"".join(map(integer, values)) + b"t" for values in (shape, strides)]
    return called(
        "torch._utils", "_rebuild_tensor_v2", stored or storage(), integer(offset), *axes, b"\x89", b"}"
    )


def state_dict(**tensors):
    return proto(b"}(", *(text(name) + value for name, value in tensors.items()), b"u")


GOOD = state_dict(a=tensor())
GOOD_STREAM = state_dict(a=tensor(stored=storage(more=b"N")))
DATA = struct.pack("<4f", 1, 2, 3, 4)


def zipped(data=GOOD, storages=(("0", DATA),), extra=(), compress=()):
    """A torch file of today's layout."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in [
            ("x/data.pkl", data),
            ("x/version", b"3\n"),
            *extra,
            *((f"x/data/{key}", held) for key, held in storages),
        ]:
            archive.writestr(name, content, zipfile.ZIP_DEFLATED if name in compress else zipfile.ZIP_STORED)
    return buffer.getvalue()


def streamed(data=GOOD_STREAM, storages=(("0", DATA),), system=None, sizes=None):
    """A torch file of the layout before: its storages are of 4-byte elements, and there are none that the
    pickle does not name.
    """
    storages = storages if text("storage") in data else ()
    magic = proto(b"\x8a\x0a" + (0x1950A86A20F9469CFC6C).to_bytes(10, "little"))
    system = proto(b"}" + text("little_endian") + b"\x88s") if system is None else system
    keys = proto(b"](" + b"".join(text(key) for key, _ in storages) + b"e")
    held = b"".join(struct.pack("<Q", sizes or len(content) // 4) + content for _, content in storages)
    return magic + proto(b"M\xe9\x03") + system + data + keys + held


# Code that wants to be run


@running("posix.system, which no model needs")
def posix_system(canary):
    return proto(called("posix", "system", text(f"touch {canary}")))


@running("os.system, which no model needs")
def os_system(canary):
    return proto(called("os", "system", text(f"touch {canary}")))


@running("os.system")
def os_system_beside_a_state_dict(canary):
    return proto(
        b"}(",
        text("state_dict"),
        b"}",
        text("callbacks"),
        called("os", "system", text(f"touch {canary}")),
        b"u",
    )


@running("os.system")
def os_system_by_stack_global(canary):
    return proto(text("os"), text("system"), b"\x93(", text(f"touch {canary}"), b"tR", version=4)


@running("builtins.exec")
def builtins_exec(canary):
    return proto(called("builtins", "exec", text(f"open({str(canary)!r}, 'w').close()")))


@running("__builtin__.eval")
def builtins_eval_of_python_2(canary):
    return proto(called("__builtin__", "eval", text(f"open({str(canary)!r}, 'w').close()")))


@running("builtins.getattr")
def nested_getattr(canary):
    module = called("builtins", "__import__", text("os"))
    return proto(
        named("builtins", "getattr"), b"(", module, text("system"), b"tR(", text(f"touch {canary}"), b"tR"
    )


@running("torch.serialization.os.system")
def a_path_through_torch(canary):
    return proto(
        text("torch.serialization"), text("os.system"), b"\x93(", text(f"touch {canary}"), b"tR", version=4
    )


@running("subprocess.check_call")
def subprocess_call(canary):
    return proto(called("subprocess", "check_call", b"](" + text("touch") + text(str(canary)) + b"e"))


@running("runpy._run_code")
def runpy_code(canary):
    code = called("builtins", "compile", text(f"open({str(canary)!r}, 'w').close()"), text("x"), text("exec"))
    return proto(called("runpy", "_run_code", code, b"}"))


@running("operator.attrgetter")
def reduce_chain(canary):
    """Calls of what calls returned."""
    getter = called("operator", "attrgetter", text("system"))
    return proto(
        getter, b"(", called("importlib", "import_module", text("os")), b"tR(", text(f"touch {canary}"), b"tR"
    )


@running("attacks_canary.anything")
def import_with_side_effects(canary):
    """Naming it is enough: the module, which lies beside the canary, writes it when it is imported."""
    (canary.parent / "attacks_canary.py").write_text(f"open({str(canary)!r}, 'w').close()\nanything = list\n")
    return proto(named("attacks_canary", "anything"), b")R")


@pickle("torch.storage._load_from_bytes")
def a_pickle_in_the_pickle(canary):
    return proto(called("torch.storage", "_load_from_bytes", b"C\x04abcd"))


@pickle("a, a torch.hub.load")
def torch_hub(canary):
    """An innocent module's dangerous function: nothing is called, and as a tensor it is refused."""
    return state_dict(a=called("torch.hub", "load", text("evil/evil"), text("evil")))


@pickle("the opcode INST")
def inst(canary):
    return proto(b"(", text(f"touch {canary}"), b"ios\nsystem\n")


@pickle("its pickle names os.system")
def obj(canary):
    return proto(b"(", named("os", "system"), text(f"touch {canary}"), b"o")


@pickle("the opcode EXT1")
def ext1(canary):
    return proto(b"\x82\x01")


@pickle("the opcode EXT2")
def ext2(canary):
    return proto(b"\x83\x01\x01")


@pickle("the opcode EXT4")
def ext4(canary):
    return proto(b"\x84\x01\0\0\0")


@pickle("the opcode PERSID")
def persid(canary):
    return proto(b"Pstorage\n")


@pickle("the opcode NEXT_BUFFER")
def next_buffer(canary):
    return proto(b"\x97", version=5)


# What wants memory, time or a crash


@pickle("a list, not a state dict")
def recursion_bomb(canary):
    return proto(b"]" * 200_000 + b"a" * 199_999)


@pickle("lies in a tensor, not in a storage")
def recursion_bomb_of_tensors(canary):
    wrap = b"q\x020h\x01(h\x02K\x00))tR"
    return proto(
        b"}", text("a"), named("torch._utils", "_rebuild_tensor_v2"), b"q\x010", b"N", wrap * 50_000, b"s"
    )


@pickle("no state dict, but: a, a list")
def memo_bomb(canary):
    """Each list holds the one before a hundred times: 100 to the power of 50 in all."""
    layers = (b"](" + b"h\x01" * 100 + b"eq\x010" for _ in range(50))
    return proto(b"}", text("a"), b"Nq\x010", *layers, b"h\x01s")


@pickle("more than 600,000 steps")
def a_million_dicts(canary):
    return proto(b"}" * 1_000_000)


@pickle("more than 600,000 steps")
def a_million_memos(canary):
    return proto(b"]\x94" * 500_000, version=4)


@pickle("cut short")
def huge_bytes(canary):
    return proto(b"\x8e" + struct.pack("<Q", 1 << 60), version=4)


@pickle("cut short")
def huge_bytearray(canary):
    return proto(b"\x96" + struct.pack("<Q", 1 << 60), version=5)


@pickle("cut short")
def huge_text(canary):
    return proto(b"\x8d" + struct.pack("<Q", 1 << 63), version=4)


@pickle("a text, not a state dict")
def wide_text(canary):
    """One letter that needs four bytes makes all others take as many."""
    return proto(text("x" * 30_000_000 + "\U0001f600"))


@pickle("cut short")
def huge_long(canary):
    return proto(b"\x8b" + struct.pack("<I", 1 << 31))


@pickle("cut short")
def huge_frame(canary):
    return proto(b"\x95" + struct.pack("<Q", 1 << 60), version=4)


@pickle("or holds a name that is too long")
def endless_name(canary):
    return proto(b"c" + b"os." * 100_000 + b"\nsystem\n")


@pickle("a number of 1000000 bytes, not a state dict")
def a_long_number(canary):
    return proto(b"\x8b" + struct.pack("<I", 1_000_000) + b"\x7f" * 1_000_000)


@pickle("names a tensor by a key that is not text")
def keys_of_one_hash(canary):
    """-1 and -2 have one hash, and so have all tuples of them: a dict of these takes quadratic time."""
    keys = (
        b"(" + b"".join(b"J" + struct.pack("<i", -1 - (n >> bit & 1)) for bit in range(16)) + b"tN"
        for n in range(30_000)
    )
    return proto(b"}(", *keys, b")", tensor(), b"u")


# What makes no sense


@pickle("more from its stack than is there")
def stack_underflow(canary):
    return proto(b"0000")


@pickle("more from its stack than is there")
def underflow_of_a_tuple(canary):
    return proto(b"N\x87")


@pickle("more from its stack than is there")
def underflow_of_marks(canary):
    return proto(b"tt")


@pickle("recalls what it never remembered")
def unknown_memo(canary):
    return proto(b"h\x07")


@pickle("the opcode b'\\xff'")
def unknown_opcode(canary):
    return proto(b"\xff")


@pickle("protocol above 5")
def unknown_protocol(canary):
    return proto(b"N", version=99)


@pickle("it holds no state dict, but: a, a dict")
def self_referencing_dict(canary):
    return proto(b"}q\x01", text("a"), b"h\x01s")


@pickle("a list, not a state dict")
def self_referencing_list(canary):
    return proto(b"]q\x01h\x01a")


@pickle("not a storage")
def persistent_id_of_nothing(canary):
    return proto(b"NQ")


@pickle("not a storage")
def persistent_id_of_odd_shape(canary):
    return proto(b"(", text("storage"), text("Float"), b"}tQ")


@pickle("not a storage")
def persistent_id_of_negative_size(canary):
    return state_dict(a=tensor(stored=storage(elements=-4)))


@pickle("unknown type")
def storage_of_another_kind(canary):
    return state_dict(a=tensor(stored=storage(kind="Tensor")))


@pickle("surrogates not allowed")
def half_a_surrogate_pair(canary):
    return proto(b"}", text("\ud800"), tensor(), b"s")


@pickle("can't decode byte")
def no_utf_8(canary):
    return proto(b"X\x01\0\0\0\xff")


@pickle("appends to something that is not a list")
def append_to_a_number(canary):
    return proto(b"K\x01Na")


@pickle("sets items of something that is not a dict")
def half_an_item(canary):
    return proto(b"}(K\x01u")


@pickle("calls something that is not a name")
def call_of_a_number(canary):
    return proto(b"K\x01)R")


@pickle("builds a tensor or a dict from something else")
def tensor_of_nothing(canary):
    return proto(called("torch._utils", "_rebuild_tensor_v2"))


@pickle("builds a tensor or a dict from something else")
def rebuild_of_rebuilds(canary):
    """A builder that is given itself would recurse."""
    name = named("torch._tensor", "_rebuild_from_type_v2")
    return proto(name, b"q\x01(h\x01N(h\x01NNNtNtR")


@pickle("tensor a reaches beyond its storage")
def tensor_beyond_its_storage(canary):
    return state_dict(a=tensor(shape=(5,)))


@pickle("tensor a reaches beyond its storage")
def offset_beyond_its_storage(canary):
    return state_dict(a=tensor(offset=1))


@pickle("tensor a reaches beyond its storage")
def product_that_overflows(canary):
    return state_dict(a=tensor(shape=(1 << 32, 1 << 32), strides=(1 << 32, 1)))


@pickle("shape, strides or an offset that no tensor has")
def negative_strides(canary):
    return state_dict(a=tensor(offset=3, strides=(-1,)))


@pickle("shape, strides or an offset that no tensor has")
def negative_offset(canary):
    return state_dict(a=tensor(offset=-1))


@pickle("shape, strides or an offset that no tensor has")
def negative_shape(canary):
    return state_dict(a=tensor(shape=(-1,)))


@pickle("shape, strides or an offset that no tensor has")
def fewer_strides_than_axes(canary):
    return state_dict(a=tensor(shape=(2, 2)))


@pickle("shape, strides or an offset that no tensor has")
def a_hundred_axes(canary):
    return state_dict(a=tensor(shape=(1,) * 100, strides=(0,) * 100))


@pickle("tensor a would be expanded to more than the whole file")
def expanded_to_exabytes(canary):
    return state_dict(a=tensor(shape=(1 << 40, 1 << 18), strides=(0, 0)))


@pickle("fewer than its pickle says")
def storage_larger_than_its_bytes(canary):
    return state_dict(a=tensor(stored=storage(elements=5)))


@pickle("lacks the storage 1")
def missing_storage(canary):
    return state_dict(a=tensor(stored=storage(key="1")), b=tensor())


@pickle("lacks the storage ../../../x")
def storage_key_that_climbs(canary):
    return state_dict(a=tensor(stored=storage(key="../../../x")), b=tensor())


# Archives and streams that lie


@file("more than 600,000 steps")
def stream_of_five_long_pickles():
    """Each alone would do."""
    return streamed(
        data=proto(b"}" + b"N0" * 200_000),
        system=proto(b"}" + text("little_endian") + b"\x88s" + b"N0" * 200_000),
    )


@file("leads out of the archive")
def zip_with_climbing_names():
    return zipped(extra=[("../../evil", b"x")])


@file("leads out of the archive")
def zip_with_absolute_names():
    return zipped(extra=[("/etc/evil", b"x")])


@file("data.pkl is compressed")
def zip_bomb():
    return zipped(proto(b"}" + b"N0" * 5_000_000), compress=["x/data.pkl"])


@file("data/0 is compressed")
def zip_bomb_of_a_storage():
    return zipped(storages=[("0", bytes(10_000_000))], compress=["x/data/0"])


@file("the opcode PERSID")
def nested_zip():
    return zipped(zip_bomb())


@file("without one data.pkl")
def another_zip():
    return zipped(extra=[("y/data.pkl", GOOD)])


@file("is a TorchScript program")
def torch_script():
    return zipped(extra=[("x/constants.pkl", GOOD)])


@file("big-endian")
def big_endian_zip():
    return zipped(extra=[("x/byteorder", b"big")])


def _directory(data):
    return struct.unpack_from("<L", data, len(data) - 6)[0]


def patched(data, at, values):
    return data[:at] + values + data[at + len(values) :]


@file("two sizes")
def zip_with_two_sizes():
    data = zipped()
    return patched(data, _directory(data) + 20, struct.pack("<L", 1 << 20))


@file("reaches into what comes after it")
def zip_whose_sizes_lie():
    data = zipped()
    return patched(data, _directory(data) + 20, struct.pack("<LL", 1 << 20, 1 << 20))


@file("reaches into what comes after it")
def zip_whose_last_size_lies():
    data = zipped()
    last = data.rfind(b"PK\1\2")
    return patched(data, last + 20, struct.pack("<LL", len(DATA) + 1, len(DATA) + 1))


@file("reaches into what comes after it")
def zip_with_overlapping_entries():
    """Two names for the same bytes."""
    data = zipped(storages=[("0", DATA), ("1", DATA)])
    first = data.rfind(b"PK\1\2", 0, data.rfind(b"PK\1\2"))
    return patched(data, data.rfind(b"PK\1\2") + 42, data[first + 42 : first + 46])


@file("is not where the archive's directory says")
def zip_with_another_name_inside():
    data = zipped()
    return patched(data, data.index(b"x/data.pkl"), b"y/data.pkl")


@file("sizes lie")
def zip_with_a_long_local_header():
    data = zipped()
    return patched(data, 28, struct.pack("<H", 60_000))


@file("holds x/version twice")
def zip_with_a_name_twice():
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return zipped(extra=[("x/version", b"4\n")])


@file("claims 3,000,000,000 entries")
def zip_that_claims_millions():
    data = zipped()
    end = len(data) - 22
    record = b"PK\6\6" + struct.pack(
        "<QHHLLQQQQ", 44, 45, 45, 0, 0, 3 * 10**9, 3 * 10**9, end - _directory(data), _directory(data)
    )
    return data[:end] + record + b"PK\6\7" + struct.pack("<LQL", 0, end, 1) + data[end:]


@file("claims 60,000 entries and holds 3")
def zip_that_claims_thousands():
    data = zipped()
    return patched(data, len(data) - 14, struct.pack("<HH", 60_000, 60_000))


@file("directory is damaged")
def zip_with_a_damaged_directory():
    data = zipped()
    return patched(data, _directory(data), b"PK\1\3")


@file("reaches beyond the file")
def zip_with_a_directory_elsewhere():
    data = zipped()
    return patched(data, len(data) - 6, struct.pack("<L", 1 << 31))


@file("not at the end of the file")
def zip_with_more_behind_it():
    return zipped() + b"more"


@file("has 40,000,015 bytes, far more than any model needs")
def zip_with_a_large_pickle():
    return zipped(proto(b"\x8e" + struct.pack("<Q", 40_000_000) + bytes(40_000_000), b"0N0", version=4))


@file("or of more than 32 MB")
def stream_with_a_large_pickle():
    return streamed(proto(b"\x8e" + struct.pack("<Q", 40_000_000) + bytes(40_000_000), version=4))


@file("or of more than 32 MB")
def stream_with_many_large_texts():
    return streamed(proto((text("x" * 65_000) + b"0") * 600))


@file("big-endian")
def big_endian_stream():
    return streamed(system=proto(b"}" + text("little_endian") + b"\x89s"))


@file("claims too much")
def stream_whose_sizes_lie():
    return streamed(sizes=1 << 62)


@file("fewer than its pickle says")
def stream_with_a_small_storage():
    return streamed(sizes=3)


@file("claims too much")
def stream_with_a_key_twice():
    return streamed(storages=[("0", DATA), ("0", DATA)])


@file("list of its storages is damaged")
def stream_with_an_unknown_key():
    return streamed(storages=[("0", DATA), ("7", DATA)])


@file("goes on after its last storage")
def stream_with_more_behind_it():
    return streamed() + b"more"


@file("none that torch.save writes")
def another_pickle():
    return proto(b"}")


@file("another protocol")
def stream_of_another_protocol():
    return streamed().replace(b"M\xe9\x03", b"M\xea\x03", 1)


@file("views of storages")
def stream_with_views():
    stored = storage(more=b"(" + text("1") + integer(0) + integer(4) + b"t")
    return streamed(state_dict(a=tensor(stored=stored)))
