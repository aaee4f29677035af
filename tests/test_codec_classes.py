"""Instances: every kind of class, no code of theirs run, and an allow-list that means what it says."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shmcast._codec import Allow, decode, encode
from shmcast.errors import EncodeError, LayoutError, NotAllowed
from tests.support import codec_types as kinds
from tests.support.codec import carry, held, round_trip, same

ITEM = kinds.Item(
    kinds.Kind.VIDEO, 5, 9, [(1, 2), (3, 4)], feature=torch.arange(6.0), model_specific_data={"grid": torch.ones(1, 3)}
)


def with_extras(obj: Any, **extras: Any) -> Any:
    obj.__dict__.update(extras)
    return obj


def bare(cls: type, **values: Any) -> Any:
    obj: Any = object.__new__(cls)
    for name, value in values.items():
        object.__setattr__(obj, name, value)
    return obj


INSTANCES = {
    "enum": kinds.Kind.IMAGE,
    "enum alias": kinds.Kind.PICTURE,
    "int enum": kinds.Level.HIGH,
    "text enum": kinds.Word.NO,
    "flag": kinds.Access.WRITE,
    "flag composite": kinds.Access.READ | kinds.Access.RUN,
    "flag named composite": kinds.Access.ALL,
    "flag none": kinds.Access(0),
    "dataclass": ITEM,
    "dataclass extras": with_extras(kinds.Item(kinds.Kind.IMAGE), later=[1], also=torch.zeros(2)),
    "dataclass absent field": bare(kinds.Item, modality=kinds.Kind.IMAGE, format="x"),
    "dataclass absent and extras": bare(kinds.Item, format="x", more=1),
    "dataclass empty": bare(kinds.Item),
    "dataclass nested": kinds.Request([ITEM, ITEM], padded_input_ids=list(range(100))),
    "frozen": kinds.Frozen((1, 2), [3]),
    "slots": kinds.Slotted(1, "two"),
    "slots absent": bare(kinds.Slotted, right=3),
    "slots and dict": kinds.Mixed(1, 2, 3),
    "slots, dict, extras": with_extras(kinds.Mixed(1, 2, 3), more=4),
    "sly": bare(kinds.Sly, value=[1, 2]),
    "namedtuple": kinds.Pair(1, (2, 3)),
    "namedtuple subclass": kinds.OpenPair(1, 2),
    "namedtuple extras": with_extras(kinds.OpenPair(1, 2), more=[3]),
    "plain": with_extras(kinds.Plain(), left=1, right=[2]),
    "plain empty": kinds.Plain(),
    "plain slots": bare(kinds.PlainSlots, left=1),
    "struct": kinds.Struct(feature=torch.arange(3)),
    "struct extras": with_extras(kinds.Struct(feature=1), later=torch.zeros(1), hash=2**63),
    "struct frozen": kinds.FrozenStruct(kinds.FrozenStruct(1)),
    "struct one field": kinds.BareStruct([1]),
}


@pytest.mark.parametrize("name", INSTANCES)
def test_instances(name: str) -> None:
    obj = INSTANCES[name]
    back = round_trip(obj, kinds.ALL)
    assert type(back) is type(obj)
    assert same(back, obj)
    assert same(held(back), held(obj))


@pytest.mark.parametrize("name", INSTANCES)
def test_instances_of_a_package(name: str) -> None:
    obj = INSTANCES[name]
    allow: list[type | str] = ["tests.support.codec_types", kinds.Plain, kinds.PlainSlots]
    assert same(round_trip([obj, obj], allow), [obj, obj])


def test_identity_of_instances_survives() -> None:
    shared = kinds.Item(kinds.Kind.IMAGE)
    back = round_trip([shared, shared, kinds.Request([shared])], kinds.ALL)
    assert back[0] is back[1] is back[2].mm_items[0]


def test_post_init_of_a_struct_does_not_run() -> None:
    obj = kinds.Struct(feature=1)
    obj.format = "post"
    back = round_trip(obj, kinds.ALL)
    assert back.format == "post"
    back.format = "still a Struct"
    assert type(back) is kinds.Struct


def test_a_struct_that_takes_any_name_is_of_its_own_class() -> None:
    obj = kinds.TakingStruct(feature=1)
    obj.feature = "post"
    obj.later = 2
    back = round_trip(obj, kinds.ALL)
    assert type(back) is kinds.TakingStruct
    assert (back.feature, back.others, back.__dict__) == ("post", {"later": 2}, {})


def test_a_struct_that_watches_its_subclasses_gets_none() -> None:
    back = round_trip(kinds.WatchingStruct(0), kinds.ALL)
    assert type(back) is kinds.WatchingStruct
    assert back.made == 2  # once by this test, once by the decoder: documented
    assert kinds.WatchingStruct.__subclasses__() == []


def test_the_instances_fields_are_where_they_were() -> None:
    back = round_trip(kinds.Mixed(1, 2, 3), kinds.ALL)
    assert back.__dict__ == {"third": 3}
    assert (back.left, back.right) == (1, 2)


def test_a_struct_with_a_field_that_is_not_set() -> None:
    obj = kinds.BareStruct(1)
    del obj.only
    with pytest.raises(EncodeError, match=r"the object itself: .*only"):
        encode(obj, Allow(kinds.ALL))


def test_msgspec_is_not_imported_for_the_asking() -> None:
    held_back = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "msgspec"}
    try:
        assert same(round_trip(kinds.Frozen(1, 2), [kinds.Frozen]), kinds.Frozen(1, 2))
        assert "msgspec" not in sys.modules
    finally:
        sys.modules.update(held_back)


def test_sixty_four_items_stay_small() -> None:
    items = [kinds.Item(kinds.Kind.IMAGE, index, feature=torch.zeros(10)) for index in range(64)]
    one, many = (len(encode(kinds.Request(items[:count]), Allow(kinds.ALL)).stream) for count in (1, 64))
    assert many - one < 63 * 100


FIELDS = st.none() | st.integers() | st.text(max_size=9) | st.lists(st.tuples(st.integers(), st.integers()), max_size=3)


@given(
    st.recursive(
        FIELDS | st.sampled_from([*kinds.Kind, *kinds.Level, *kinds.Word]) | st.integers(0, 7).map(kinds.Access),
        lambda inner: (
            st.builds(kinds.Item, st.sampled_from(kinds.Kind), feature=inner, offsets=inner, hash=inner)
            | st.builds(kinds.Frozen, inner, inner)
            | st.builds(kinds.Mixed, inner, inner, inner)
            | st.builds(kinds.Pair, inner, inner)
            | st.builds(lambda feature, extra: with_extras(kinds.Struct(feature=feature), extra=extra), inner, inner)
            | st.builds(
                lambda extras: with_extras(kinds.Plain(), **extras), st.dictionaries(st.text(), inner, max_size=3)
            )
            | st.lists(inner, max_size=3)
        ),
        max_leaves=12,
    )
)
def test_any_tree_of_instances_round_trips(tree: Any) -> None:
    assert same(round_trip(tree, kinds.ALL), tree)


# The allow-list.


def module(name: str, **classes: type) -> types.ModuleType:
    made = types.ModuleType(name)
    for key, cls in classes.items():
        cls.__module__ = name
        cls.__qualname__ = key
        setattr(made, key, cls)
    return made


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """`sglang`, `sglang.srt` and `sglangx`, each with a dataclass and a plain class."""
    for name in ("sglang", "sglang.srt", "sglangx"):
        made = module(name, Item=new_dataclass(), Plain=type("Plain", (), {}))
        monkeypatch.setitem(sys.modules, name, made)


def new_dataclass() -> type:
    import dataclasses

    return dataclasses.make_dataclass("Item", [("value", int)])


@pytest.mark.parametrize(
    ("rule", "home", "admitted"),
    [
        ("sglang", "sglang", True),
        ("sglang", "sglang.srt", True),
        ("sglang", "sglangx", False),
        ("sglang.srt", "sglang", False),
        ("sglang.srt", "sglang.srt", True),
        ("sglangx", "sglang", False),
    ],
)
def test_a_package_admits_itself_and_what_is_below(packages: None, rule: str, home: str, admitted: bool) -> None:
    obj = sys.modules[home].Item(5)
    encoded = encode(obj, Allow([home]))
    if admitted:
        assert decode(encoded.stream, (), Allow([rule])) == obj
        assert encode(obj, Allow([rule])) == encoded
        return
    with pytest.raises(NotAllowed, match=f"{home}.Item is not in the allow-list"):
        decode(encoded.stream, (), Allow([rule]))
    with pytest.raises(NotAllowed, match=f"the object itself: {home}.Item is not in the allow-list"):
        encode(obj, Allow([rule]))


def test_a_package_does_not_admit_plain_classes(packages: None) -> None:
    cls = sys.modules["sglang"].Plain
    with pytest.raises(NotAllowed, match="name the class itself"):
        encode(cls(), Allow(["sglang"]))
    stream = encode(cls(), Allow([cls])).stream
    with pytest.raises(NotAllowed, match="name the class itself"):
        decode(stream, (), Allow(["sglang"]))
    assert type(decode(stream, (), Allow([cls]))) is cls


def test_a_name_that_another_module_only_imported(packages: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["sglang"], "Stranger", sys.modules["sglangx"].Item, raising=False)
    stream = encode(sys.modules["sglangx"].Item(1), Allow(["sglangx"])).stream
    forged = stream.replace(b"sglangx:Item", b"sglang:Stranger").replace(
        (len(b"sglangx:Item:") + 16).to_bytes(4, "little"), (len(b"sglang:Stranger:") + 16).to_bytes(4, "little"), 1
    )
    with pytest.raises(NotAllowed, match=r"really sglangx\.Item"):
        decode(forged, (), Allow(["sglang"]))


def test_a_class_that_was_replaced_in_its_module(packages: None, monkeypatch: pytest.MonkeyPatch) -> None:
    old = sys.modules["sglang"].Item(1)
    replaced = new_dataclass()
    replaced.__module__ = "sglang"
    monkeypatch.setattr(sys.modules["sglang"], "Item", replaced)
    with pytest.raises(EncodeError, match="not the class that its module has"):
        encode(old, Allow(["sglang"]))


def test_a_name_that_a_module_only_makes_up_on_request(packages: None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(sys.modules["sglang"], "__getattr__", asked.append, raising=False)
    with pytest.raises(NotAllowed, match="has no class Missing"):
        Allow(["sglang"]).by_name("sglang", "Missing")
    assert not asked


def test_other_fields_at_the_reader(packages: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    stream = encode(sys.modules["sglang"].Item(1), Allow(["sglang"])).stream
    grown = dataclasses.make_dataclass("Item", [("value", int), ("more", int, 0)])
    grown.__module__ = "sglang"
    monkeypatch.setattr(sys.modules["sglang"], "Item", grown)
    with pytest.raises(LayoutError, match="other fields here"):
        decode(stream, (), Allow(["sglang"]))


def test_a_program_is_not_imported(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "progpackage"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text("raise SystemExit('ran')")
    (package / "broken.py").write_text("raise SystemExit('ran')")
    monkeypatch.syspath_prepend(tmp_path)
    allow = Allow(["progpackage"])
    with pytest.raises(NotAllowed, match="not in the allow-list"):
        allow.by_name("progpackage.__main__", "Anything")
    with pytest.raises(NotAllowed, match="cannot be imported"):
        allow.by_name("progpackage.broken", "Anything")
    for name in ("progpackage", "progpackage.broken"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("items", ["sglang", kinds.Kind], ids=["text", "class"])
def test_allow_is_a_sequence(items: Any) -> None:
    with pytest.raises(TypeError, match="sequence"):
        Allow(items)


@pytest.mark.parametrize(
    "item", [5, "", "a b", "sglang.", ".x", "a..b", "os:system", kinds.Outer.Nested, dict, ValueError, type], ids=repr
)
def test_what_cannot_be_allowed(item: Any) -> None:
    with pytest.raises(TypeError):
        Allow([item])


def test_two_classes_of_one_name() -> None:
    twin = type("Plain", (), {"__module__": kinds.__name__})
    with pytest.raises(TypeError, match="two classes"):
        Allow([kinds.Plain, twin])
    assert len(repr(Allow([kinds.Plain, kinds.Plain, "sglang"]))) > 10


def test_a_class_of_the_main_module_in_a_spawned_child() -> None:
    there, here = (
        type("Plain", (), {"__module__": name, "__qualname__": "Plain"}) for name in ("__main__", "__mp_main__")
    )
    stream = encode(with_extras(there(), left=1), Allow([there])).stream
    back: Any = decode(stream, (), Allow([here]))
    assert type(back) is here
    assert held(back) == {"left": 1}


def test_the_types_of_this_library_are_always_in() -> None:
    assert Allow()._admits("shmcast.multimodal")
    assert not Allow()._admits("shmcast")


def test_one_allow_serves_many_messages() -> None:
    allow = Allow(kinds.ALL)
    for obj in (ITEM, kinds.Kind.VIDEO, ITEM):
        encoded = encode(obj, allow)
        assert same(decode(encoded.stream, carry(encoded), allow), obj)
    assert allow.by_class(kinds.Item) is allow.by_name(kinds.__name__, "Item")
