import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers.distributed import DistributedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fusmae_hf import (
    FusMAEBackbone,
    FusMAEForImageClassification,
    FusMAEForPreTraining,
    FusMAEForSemanticSegmentation,
    FusMAEModel,
)

from .conftest import CLASSES


def tensors(outputs) -> list[torch.Tensor]:
    """All floating point tensors of an output."""
    flat = []
    for value in outputs.values():
        flat += value if isinstance(value, tuple) else [value]
    return [value for value in flat if value.is_floating_point()]


@pytest.fixture
def inputs(images) -> dict:
    """Makes the inputs of a class; `batch` of them, some samples without SAR where `mixed`."""

    def make(model_class, batch: int = 4, mixed: bool = False, size: int = 16) -> dict[str, torch.Tensor]:
        values = {
            "pixel_values": torch.randn(batch, 3, size, size),
            "pixel_values_sar": torch.randn(batch, 2, size, size),
        }
        if model_class is FusMAEForPreTraining:
            patches = (size // 4) ** 2
            values |= {"noise": torch.rand(batch, patches), "noise_sar": torch.rand(batch, patches)}
        if mixed:
            values["sar_available"] = torch.arange(batch) != 1
        return values

    return make


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# --- attention implementations -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention"])
@pytest.mark.parametrize("model_class", CLASSES)
def test_attention_implementations_agree(tiny, inputs, model_class, implementation, dtype):
    config = tiny(num_hidden_layers=1)
    plain = model_class._from_config(config, attn_implementation="eager", dtype=dtype).eval()
    other = model_class._from_config(config, attn_implementation=implementation, dtype=dtype).eval()
    other.load_state_dict(plain.state_dict())
    values = inputs(model_class, mixed=True)
    with torch.no_grad():
        expected, got = tensors(plain(**values)), tensors(other(**values))
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 5e-2, "atol": 5e-2}
    for first, second in zip(got, expected, strict=True):
        torch.testing.assert_close(first, second, **tolerance)


def test_flash_attention_never_gets_the_mask_of_another_sensor(tiny, inputs, monkeypatch):
    """Stands in for flash attention: like it, takes the mask `(batch, keys)` of keys for that of the queries."""

    def flash(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
        mask = None
        if attention_mask is not None:
            assert query.shape[2] == key.shape[2] == attention_mask.shape[1]
            mask = attention_mask[:, None, None].bool()
        output = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=scaling)
        if mask is not None:
            output = output * attention_mask[:, None, :, None]
        return output.transpose(1, 2), None

    values = inputs(FusMAEForPreTraining, mixed=True)
    model = FusMAEForPreTraining(tiny(decoder_context="all")).eval()
    expected = model(**values)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "flash_attention_2", flash)
    model.config._attn_implementation_internal = "flash_attention_2"
    got = model(**values)
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.logits_sar, expected.logits_sar, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_class", [FusMAEForImageClassification, FusMAEForSemanticSegmentation, FusMAEBackbone])
def test_every_head_gives_the_maps_of_self_and_cross_attention(tiny, inputs, model_class):
    model = model_class._from_config(tiny(), attn_implementation="eager")
    outputs = model(**inputs(model_class), output_attentions=True)
    assert [weights.shape for weights in outputs.attentions] == [(4, 4, 33, 33)] * 2
    assert [weights.shape for weights in outputs.cross_attentions] == [(4, 4, 16, 16)] * 2
    for weights in (*outputs.attentions, *outputs.cross_attentions):
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(weights.shape[:-1]))


# --- compilation ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("model_class", CLASSES)
def test_compiled_forward_is_one_graph_and_is_not_compiled_again(tiny, inputs, model_class, mixed, fresh_dynamo):
    model = model_class(tiny()).eval()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        for _ in range(3):
            values = inputs(model_class, mixed=mixed)
            for first, second in zip(tensors(compiled(**values)), tensors(model(**values)), strict=True):
                torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"modality_dropout": 0.25, "decoder_context": "all"}])
def test_compiled_training_has_the_gradients_of_plain_training(tiny, inputs, fields, fresh_dynamo):
    model = FusMAEForPreTraining(tiny(**fields)).train()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for _ in range(3):
        values = inputs(FusMAEForPreTraining)
        model.zero_grad()
        model(**values).loss.backward()
        expected = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        compiled(**values).loss.backward()
        for parameter, gradient in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize("labels", [torch.randint(0, 2, (4,)), torch.rand(4, 2)])
def test_compiled_classification_takes_labels(tiny, inputs, labels, fresh_dynamo):
    model = FusMAEForImageClassification(tiny())
    values = inputs(FusMAEForImageClassification) | {"labels": labels}
    expected = model(**values).loss
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(**values).loss, expected)


# --- export --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    ("model_class", "dynamic"),
    # The number of patches that pretraining shows is a Python number, so that its size stays fixed.
    [
        (model_class, dynamic)
        for model_class in CLASSES
        for dynamic in ("nothing", "batch", "size")
        if (model_class, dynamic) != (FusMAEForPreTraining, "size")
    ],
)
def test_exported_programs_give_what_the_model_gives(tiny, inputs, model_class, dynamic, strict):
    model = model_class(tiny()).eval()
    example = inputs(model_class, mixed=dynamic == "batch")
    shapes, other = None, inputs(model_class)
    if dynamic == "batch":
        shapes = {name: {0: torch.export.Dim.DYNAMIC} for name in example}
        other = inputs(model_class, batch=7, mixed=True)
    elif dynamic == "size":
        side = 4 * torch.export.Dim("side", min=2, max=64)
        shapes = {name: {2: side, 3: side} for name in example}
        other = inputs(model_class, size=24)
    with torch.no_grad():
        program = torch.export.export(model, (), example, dynamic_shapes=shapes, strict=strict)
        for first, second in zip(tensors(program.module()(**other)), tensors(model(**other)), strict=True):
            torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


# --- sharding ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(
    not hasattr(FusMAEModel, "_resolve_parallel_plans"), reason="this release of transformers resolves plans elsewhere"
)
@pytest.mark.parametrize("model_class", CLASSES)
@pytest.mark.parametrize("fields", [{}, {"early_fusion": "none", "decoder_num_hidden_layers": 0}])
def test_the_sharding_plan_names_every_large_block(tiny, caplog, model_class, fields):
    model = model_class(tiny(**fields))
    _, _, plan = model._resolve_parallel_plans(DistributedConfig(fsdp_size=2))
    names = {name for name, module in model.named_modules() if type(module).__name__ in model._no_split_modules}
    blocks = {name for name in names if "embeddings" not in name}
    assert blocks <= set(plan)
    assert set(plan) - blocks == {f"{'' if model_class is FusMAEModel else 'fusmae.'}layernorm"}
    assert not caplog.text
