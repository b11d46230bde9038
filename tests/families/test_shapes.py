"""Configurations of networks, read off the shapes of a single file's tensors."""

import pytest

from tests.families.test_names import KINDS, single_shapes, whole
from tests.golden.cases import SINGLE_FILES


@pytest.mark.parametrize("family", SINGLE_FILES)
def test_configurations_are_read_off_the_shapes(family):
    header = whole(single_shapes(family))
    for part, network in KINDS[family].networks.items():
        found = network.infer({n: info.shape for n, info in network.tensors(header).items()})
        assert network.parse(found) == network.parse(SINGLE_FILES[family][part])


def test_heads_follow_the_layers_around_the_transformers():
    """A file with the text encoder of 1.x may have a UNet like that of 2.x, and the other way round."""
    for family, other in (("1", "2"), ("2", "1")):
        network = KINDS[family].networks["unet"]
        found = network.infer(
            {n: info.shape for n, info in KINDS[other].networks["unet"].tensors(whole(single_shapes(other))).items()}
        )
        assert found["attention_head_dim"] == SINGLE_FILES[other]["unet"]["attention_head_dim"]


def test_the_last_layer_of_openclip_is_left_out():
    shapes = single_shapes("2")
    last = "cond_stage_model.model.transformer.resblocks.22."
    more = {n.replace(".22.", ".23."): s for n, s in shapes.items() if n.startswith(last)}
    network = KINDS["2"].networks["text_encoder"]
    found = network.tensors(whole(shapes | more))
    assert network.infer({n: info.shape for n, info in found.items()})["num_hidden_layers"] == 23
    assert not any(".23." in name for name in found)
