"""Stochastic depth, class weights and the focal loss."""

import pytest
import torch

from fusmae_hf import FusMAEForImageClassification, FusMAEForSemanticSegmentation, FusMAEModel
from fusmae_hf.modeling.labels_fusmae import weighted_loss
from fusmae_hf.modeling.modeling_fusmae import FusMAEDropPath


def test_stochastic_depth_at_rate_zero_is_exactly_the_identity_and_draws_nothing(tiny, images):
    model = FusMAEModel(tiny(drop_path_rate=0.0))
    state = torch.get_rng_state()
    trained = model.train()(**images).last_hidden_state
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(trained, model.eval()(**images).last_hidden_state)


def test_stochastic_depth_acts_in_training_alone(tiny, images):
    plain = FusMAEModel(tiny())
    model = FusMAEModel(tiny(drop_path_rate=0.5))
    model.load_state_dict(plain.state_dict())
    expected = plain.eval()(**images).last_hidden_state
    assert torch.equal(model.eval()(**images).last_hidden_state, expected)
    model.train()
    first, second = (model(**images).last_hidden_state for _ in range(2))
    assert not torch.equal(first, second)


def test_stochastic_depth_skips_whole_samples_and_keeps_the_mean():
    drop = FusMAEDropPath(0.25).train()
    dropped = drop(torch.ones(4000, 3, 2))
    assert dropped.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert (dropped == dropped[:, :1, :1]).all()
    assert dropped.mean() == pytest.approx(1, abs=0.05)


def test_the_rate_grows_with_depth_and_leaves_the_decoder_alone(tiny):
    from fusmae_hf import FusMAEForPreTraining

    model = FusMAEForPreTraining(tiny(num_hidden_layers=4, drop_path_rate=0.4))
    assert [layer.drop_path.rate for layer in model.fusmae.layers] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert {layer.drop_path.rate for layer in model.optical_decoder.layers} == {0}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"drop_path_rate": 1.0}, "must lie in"),
        ({"focal_gamma": -1.0}, "`focal_gamma` must be"),
        ({"class_weights": [1.0, -2.0]}, "finite and not negative"),
    ],
)
def test_impossible_settings_are_refused(tiny, fields, message):
    with pytest.raises(Exception, match=message):
        tiny(**fields)


def test_weights_must_be_as_many_as_classes(tiny):
    with pytest.raises(ValueError, match=r"`class_weights` has 2 values for 3 classes"):
        FusMAEForImageClassification(tiny(num_labels=3, class_weights=[1.0, 2.0]))


def test_weighted_focal_loss_of_one_class_each_by_hand(tiny):
    config = tiny(num_labels=2, class_weights=[0.5, 2.0], focal_gamma=2.0)
    logits = torch.log(torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7]]))
    labels = torch.tensor([0, 1, -100])
    by_hand = (0.5 * 0.1**2 * -torch.log(torch.tensor(0.9)) + 2 * 0.6**2 * -torch.log(torch.tensor(0.4))) / 2
    torch.testing.assert_close(weighted_loss(logits, labels, config), by_hand)


def test_weighted_focal_loss_of_several_classes_by_hand(tiny):
    config = tiny(num_labels=2, class_weights=[3.0, 1.0], focal_gamma=1.0)
    probability = torch.tensor([[0.8, 0.3]])
    labels = torch.tensor([[1.0, 0.0]])
    logits = torch.logit(probability)
    by_hand = (3 * 0.2 * -torch.log(torch.tensor(0.8)) + 0.3 * -torch.log(torch.tensor(0.7))) / 2
    torch.testing.assert_close(weighted_loss(logits, labels, config, multi_label=True), by_hand)


@pytest.mark.parametrize("multi_label", [False, True])
def test_without_weights_and_focus_it_is_the_plain_cross_entropy(tiny, multi_label):
    logits = torch.randn(6, 3)
    labels = torch.rand(6, 3).round() if multi_label else torch.randint(0, 3, (6,))
    plain = torch.nn.functional.binary_cross_entropy_with_logits if multi_label else torch.nn.functional.cross_entropy
    torch.testing.assert_close(weighted_loss(logits, labels, tiny(num_labels=3), multi_label), plain(logits, labels))


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_a_sure_prediction_and_an_ignored_label_have_finite_gradients(tiny, gamma):
    logits = torch.tensor([[60.0, -60.0], [0.0, 0.0]], requires_grad=True)
    weighted_loss(logits, torch.tensor([0, -100]), tiny(num_labels=2, focal_gamma=gamma)).backward()
    assert logits.grad.isfinite().all()
    assert (logits.grad[1] == 0).all()


def test_the_heads_use_weights_and_focus(tiny, images):
    fields = {"num_labels": 3, "class_weights": [1.0, 2.0, 0.0], "focal_gamma": 1.5}
    scenes = FusMAEForImageClassification(tiny(**fields)).eval()
    labels = torch.tensor([0, 1, 2, 1])
    outputs = scenes(**images, labels=labels)
    torch.testing.assert_close(outputs.loss, weighted_loss(outputs.logits, labels, scenes.config))
    dense = FusMAEForSemanticSegmentation(tiny(**fields)).eval()
    labels = torch.randint(0, 3, (4, 16, 16))
    labels[:, :4] = 255
    outputs = dense(**images, labels=labels)
    expected = weighted_loss(outputs.logits, labels, dense.config, ignore_index=255)  # patches of 4 px: same size
    torch.testing.assert_close(outputs.loss, expected)


def test_settings_travel_with_the_checkpoint(tiny, images, tmp_path):
    fields = {"num_labels": 3, "class_weights": [1.0, 2.0, 3.0], "focal_gamma": 1.0, "drop_path_rate": 0.1}
    FusMAEForImageClassification(tiny(**fields)).save_pretrained(tmp_path)
    config = FusMAEForImageClassification.from_pretrained(tmp_path).config
    assert (config.class_weights, config.focal_gamma, config.drop_path_rate) == ([1.0, 2.0, 3.0], 1.0, 0.1)
