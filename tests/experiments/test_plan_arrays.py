"""Arrays and collectives of the layouts, on eight devices."""

import dataclasses

import pytest
from test_layouts import case

from experiments.plan import arrays
from switchmoe.data import batches
from switchmoe.parallel.sharding import LAYOUTS


@pytest.fixture(scope="module")
def found():
    settings = case()
    data = dataclasses.replace(settings.data, input_length=12, target_length=0)
    settings = dataclasses.replace(settings, data=data)
    return {layout: arrays.placed(settings, layout) for layout in LAYOUTS}, batches.lengths(data)


@pytest.mark.slow
def test_the_parts_of_an_array_are_all_of_it_and_every_device_has_one(found):
    for one in found[0].values():
        for array in one.arrays.values():
            parts = arrays.regions(array)
            area = sum((bottom - top) * (right - left) for (top, bottom), (left, right) in parts)
            assert area == pytest.approx(1)
            assert sorted(device for devices in parts.values() for device in devices) == list(range(8))


@pytest.mark.slow
def test_experts_lie_as_the_layout_says(found):
    name = next(title for title in arrays.DRAWN if title.startswith("experts"))
    parts = {layout: arrays.regions(one.arrays[name]) for layout, one in found[0].items()}
    assert {layout: len(of) for layout, of in parts.items()} == {
        "data": 1,
        "model": 8,
        "data_model": 2,
        "data_expert": 8,
        "data_expert_model": 8,
    }
    assert parts["data_expert"][((0, 1 / 8), (0, 1))] == [0]


@pytest.mark.slow
def test_tokens_travel_where_experts_lie_apart_alone(found):
    for layout, one in found[0].items():
        calls = one.collectives.get("all-to-all", {}).get("count", 0)
        assert calls == (8 if "expert" in layout else 0), layout  # 2 + 2 in the sparse layer of each stack


@pytest.mark.slow
def test_experts_apart_take_less_of_a_device(found):
    assert found[0]["data_expert"].state_bytes < found[0]["data"].state_bytes


@pytest.mark.slow
def test_pictures_have_a_panel_for_each_array_and_layout(found):
    first = next(iter(found[0].values()))
    assert len(arrays.picture(found[0]).axes) == len(LAYOUTS) * len(first.arrays)
    assert len(arrays.collectives(found[0]).axes) == 2


def test_devices_are_written_as_ranges():
    assert arrays.numbered([0, 1, 2, 3]) == "0-3"
    assert arrays.numbered([0, 2, 4, 6]) == "0,2,4,6"
    assert arrays.numbered([0, 1, 4, 5, 6]) == "0,1,4-6"
