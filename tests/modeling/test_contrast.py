import math

import pytest
import torch
from torch import distributed, multiprocessing

from fusmae_hf import (
    FusMAEConfig,
    FusMAEForImageClassification,
    FusMAEForPreTraining,
    FusMAEForSemanticSegmentation,
    FusMAEModel,
)
from fusmae_hf.modeling.contrast_fusmae import FusMAEContrast

CONTRASTIVE = {"contrastive_loss_weight": 0.1, "contrastive_projection_size": 8}


@pytest.fixture
def noise() -> dict[str, torch.Tensor]:
    return {"noise": torch.rand(4, 16), "noise_sar": torch.rand(4, 16)}


@pytest.fixture
def model(tiny) -> FusMAEForPreTraining:
    return FusMAEForPreTraining(tiny(**CONTRASTIVE)).train()


def by_hand(model, images, noise, rows):
    """InfoNCE of some pairs, spelt out."""
    logits = []
    kept = model.draw_masks(4, 16, **noise)
    for sensor, suffix, ids in (("optical", "", kept[0]), ("sar", "_sar", kept[1])):
        given = {f"pixel_values{suffix}": images[f"pixel_values{suffix}"][rows], f"ids_keep{suffix}": ids[rows]}
        pooled = model.fusmae(**given).pooler_output
        head = getattr(model.contrast, sensor)
        vectors = head.down_proj(torch.nn.functional.gelu(head.up_proj(pooled)))
        logits.append(vectors / vectors.norm(dim=1, keepdim=True))
    similarity = logits[0] @ logits[1].T / model.config.contrastive_temperature
    right = similarity.diagonal()
    return -((right - similarity.logsumexp(0)).mean() + (right - similarity.logsumexp(1)).mean()) / 2


def test_the_loss_is_infonce_of_the_visible_tokens_of_each_sensor_alone(model, images, noise):
    outputs = model(**images, **noise)
    torch.testing.assert_close(outputs.contrastive_loss, by_hand(model, images, noise, [0, 1, 2, 3]))
    plain = outputs.optical_loss + outputs.sar_loss
    torch.testing.assert_close(outputs.loss, plain + 0.1 * outputs.contrastive_loss)


def test_reconstruction_is_that_of_a_model_without_the_contrastive_loss(model, images, noise, tiny):
    plain = FusMAEForPreTraining(tiny())
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("contrast.")})
    one, other = model(**images, **noise), plain(**images, **noise)
    assert torch.equal(one.logits, other.logits)
    assert torch.equal(one.sar_loss, other.sar_loss)
    assert other.contrastive_loss is None


def test_pairs_without_a_sensor_are_left_out_whatever_stands_there(model, images, noise):
    images["pixel_values_sar"][1] = float("nan")
    outputs = model(**images, **noise, sar_available=torch.tensor([True, False, True, True]))
    torch.testing.assert_close(outputs.contrastive_loss, by_hand(model, images, noise, [0, 2, 3]))
    outputs.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_pairs_whose_visible_patches_hold_no_data_are_left_out(model, images, noise):
    mask = torch.ones(4, 16, 16, dtype=torch.bool)
    mask[2] = False
    outputs = model(**images, **noise, pixel_mask=mask)
    torch.testing.assert_close(outputs.contrastive_loss, by_hand(model, images, noise, [0, 1, 3]))


@pytest.mark.parametrize("complete", [0, 1])
def test_fewer_than_two_complete_pairs_give_zero_and_finite_gradients_everywhere(model, images, noise, complete):
    available = torch.arange(4) < complete
    outputs = model(**images, **noise, sar_available=available)
    assert outputs.contrastive_loss == 0
    outputs.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.contrast.parameters())
    assert all((p.grad == 0).all() for p in model.contrast.parameters())


def test_a_batch_of_one_pair_or_of_one_sensor_gives_zero(model, images, noise):
    one = model(**{k: v[:1] for k, v in (images | noise).items()})
    assert one.contrastive_loss == 0
    alone = model(pixel_values_sar=images["pixel_values_sar"], **noise)
    assert alone.contrastive_loss == 0
    torch.testing.assert_close(alone.loss, alone.sar_loss)
    assert model(**images, **noise, return_loss=False).contrastive_loss is None


def test_copies_of_a_pair_count_against_each_other(model, images, noise):
    copied = {k: v[:1].expand(4, *v.shape[1:]) for k, v in (images | noise).items()}
    torch.testing.assert_close(model(**copied).contrastive_loss, torch.tensor(math.log(4)))


@pytest.mark.parametrize("early_fusion", ["cross_attention", "none"])
def test_what_modality_dropout_shows_alone_is_not_encoded_again(tiny, images, noise, early_fusion):
    model = FusMAEForPreTraining(tiny(**CONTRASTIVE, modality_dropout=0.25, early_fusion=early_fusion)).train()
    calls = []
    model.fusmae.register_forward_pre_hook(lambda module, args, given: calls.append(given), with_kwargs=True)
    loss = model(**images, **noise).contrastive_loss
    torch.testing.assert_close(loss, by_hand(model, images, noise, [0, 1, 2, 3]))
    assert len(calls) == 3 + 1 + 2 + 1 + 2  # those of the check: 2


def test_the_temperature_is_learned_and_bounded(tiny, images, noise):
    model = FusMAEForPreTraining(tiny(**CONTRASTIVE, contrastive_temperature=0.05))
    assert model.contrast.log_scale.item() == pytest.approx(math.log(20))
    model(**images, **noise).loss.backward()
    assert model.contrast.log_scale.grad.abs().item() > 0
    with torch.no_grad():
        model.contrast.log_scale.fill_(50.0)
    assert model(**images, **noise).contrastive_loss.isfinite()


def test_embeddings_are_of_each_sensor_alone_and_of_unit_length(model, images):
    model.eval()
    found = model.embed(**images, sar_available=torch.tensor([True, True, False, True]))
    alone = model.embed(pixel_values=images["pixel_values"])
    torch.testing.assert_close(found.optical_embeds, alone.embeds)
    assert found.sar_embeds[2].abs().max() == 0
    torch.testing.assert_close(found.embeds[2], alone.embeds[2])
    torch.testing.assert_close(found.embeds.norm(dim=1), torch.ones(4))
    mean = (found.optical_embeds[0] + found.sar_embeds[0]) / 2
    torch.testing.assert_close(found.embeds[0], mean / mean.norm())


def test_a_model_without_projections_says_so(tiny, images):
    with pytest.raises(ValueError, match="no projections: it was pretrained without the contrastive loss"):
        FusMAEForPreTraining(tiny()).embed(**images)


def test_projections_are_saved_and_other_heads_ignore_them(model, tmp_path, images):
    model.eval().save_pretrained(tmp_path)
    again = FusMAEForPreTraining.from_pretrained(tmp_path).eval()
    assert torch.equal(again.embed(**images).embeds, model.embed(**images).embeds)
    for head in (FusMAEModel, FusMAEForImageClassification, FusMAEForSemanticSegmentation):
        _, report = head.from_pretrained(tmp_path, num_labels=3, output_loading_info=True)
        assert not report["unexpected_keys"]
    paper = FusMAEForPreTraining.from_pretrained(tmp_path, contrastive_loss_weight=0.0)
    assert paper.contrast is None


def test_an_older_checkpoint_loads_with_the_plain_defaults(tiny, tmp_path):
    FusMAEForPreTraining(tiny()).save_pretrained(tmp_path)
    config = FusMAEConfig.from_pretrained(tmp_path).to_dict()
    for name in (*CONTRASTIVE, "contrastive_temperature", "feature_layers"):
        config.pop(name, None)
    model, report = FusMAEForPreTraining.from_pretrained(
        tmp_path, config=FusMAEConfig.from_dict(config), output_loading_info=True
    )
    assert not report["missing_keys"]
    assert (model.config.contrastive_loss_weight, model.config.feature_layers) == (0.0, None)


def test_the_objectives_have_names():
    assert FusMAEConfig.from_preset("tiny", objective="fusmae").contrastive_loss_weight == 0
    assert FusMAEConfig.from_preset("tiny", objective="fusmae_contrastive").contrastive_loss_weight == 0.1
    with pytest.raises(ValueError, match="Unknown objective 'mae'; known: \\['fusmae', 'fusmae_contrastive'\\]"):
        FusMAEConfig.from_preset("tiny", objective="mae")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"contrastive_loss_weight": -1}, "must be zero or a positive number"),
        ({"contrastive_loss_weight": float("nan")}, "must be zero or a positive number"),
        ({"contrastive_projection_size": 0}, "must be at least 1"),
        ({"contrastive_temperature": 0}, "must lie in \\[0.01, 1\\]"),
        ({"contrastive_loss_weight": 0.1, "mask_ratio": {"optical": 0.5, "sar": 1}}, "hides every sar patch"),
        ({"feature_layers": [0, 3]}, "`feature_layers` must increase from 0 at least to 2"),
        ({"feature_layers": [1, 1]}, "`feature_layers` must increase"),
        ({"feature_layers": []}, "`feature_layers` must increase"),
        ({"feature_layers": [-1, 2]}, "`feature_layers` must increase"),
    ],
)
def test_contradictions_are_refused(tiny, fields, message):
    with pytest.raises(Exception, match=message):
        tiny(**fields)


def parts_of_a_process(rank, folder, state, config, batch, available):
    """Gradients of the contrast of this process' half of the batch, averaged as DDP does."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    contrast = FusMAEContrast(FusMAEConfig(**config))
    contrast.load_state_dict(state)
    half = slice(2 * rank, 2 * rank + 2)
    given = [values[half].clone().requires_grad_() for values in batch]
    loss = contrast.train()(*given, available[half])
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in contrast.named_parameters()}
    for gradient in gradients.values():
        distributed.all_reduce(gradient)
        gradient /= 2
    # What flows into the encoder is averaged with its gradients, so halved, too.
    pooled = [values.grad / 2 for values in given]
    torch.save({"loss": loss.detach(), "gradients": gradients, "pooled": pooled}, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def test_two_processes_learn_from_each_others_pairs_what_one_would(tiny, tmp_path):
    config = tiny(**CONTRASTIVE)
    model = FusMAEForPreTraining(config)
    contrast, batch = model.contrast, [torch.randn(4, 32, requires_grad=True) for _ in range(2)]
    available = torch.tensor([True, True, False, True])
    loss = contrast.train()(*batch, available)
    loss.backward()
    state = {name: values.detach() for name, values in contrast.state_dict().items()}
    fields = {name: getattr(config, name) for name in config._own_fields()}
    arguments = (str(tmp_path), state, fields, [values.detach() for values in batch], available)
    multiprocessing.spawn(parts_of_a_process, arguments, nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for rank, of_rank in enumerate(found):
        torch.testing.assert_close(of_rank["loss"], loss.detach())
        for name, parameter in contrast.named_parameters():
            torch.testing.assert_close(of_rank["gradients"][name], parameter.grad)
        for values, whole in zip(of_rank["pooled"], batch, strict=True):
            torch.testing.assert_close(values, whole.grad[2 * rank : 2 * rank + 2])
