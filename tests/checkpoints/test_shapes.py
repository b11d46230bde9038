"""Configurations of networks, read off the shapes of a single file's tensors."""

import pytest

from sd_numba.checkpoints.names import component_tensors
from sd_numba.checkpoints.opening import NETWORKS
from sd_numba.checkpoints.shapes import infer_text_encoder, infer_unet, infer_vae
from tests.checkpoints.test_names import single_shapes, whole
from tests.golden.cases import SINGLE_FILES


@pytest.mark.parametrize("family", SINGLE_FILES)
def test_configurations_are_read_off_the_shapes(family):
    header = whole(single_shapes(SINGLE_FILES[family]))
    shapes = {part: {n: info.shape for n, info in component_tensors(header, part).items()} for part in NETWORKS}
    found = {
        "text_encoder": infer_text_encoder(shapes["text_encoder"], family == "2"),
        "unet": infer_unet(shapes["unet"]),
        "vae": infer_vae(shapes["vae"]),
    }
    for part, (_, parse) in NETWORKS.items():
        assert parse(found[part]) == parse(SINGLE_FILES[family][part])


def test_the_last_layer_of_openclip_is_left_out():
    shapes = single_shapes(SINGLE_FILES["2"])
    last = "cond_stage_model.model.transformer.resblocks.22."
    more = {n.replace(".22.", ".23."): s for n, s in shapes.items() if n.startswith(last)}
    found = component_tensors(whole(shapes | more), "text_encoder")
    assert infer_text_encoder({n: info.shape for n, info in found.items()}, True)["num_hidden_layers"] == 23
    assert not any(".23." in name for name in found)
