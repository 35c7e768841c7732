"""The task on pictures: processes, draws, losses; against diffusers' own schedulers."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image

import lorica
import tiny_pipelines as pipelines
from lorica.errors import BaseModelError, ConfigError, DataError
from lorica.tasks import TextToImage
from lorica.tasks.denoising import conditions, process_of
from lorica.tasks.text_to_image import EVAL_DRAWS, draws_of
from lorica.train.identity import fingerprint
from lorica.train.measure import mean_loss


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipelines")
    return {
        kind: lorica.load_model(
            pipelines.write(kind, root / kind), task="text-to-image", dtype="float32"
        )
        for kind in pipelines.MADE
    }


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder, found = tmp_path_factory.mktemp("pictures"), []
    rng = np.random.default_rng(0)
    for i in range(5):
        numbers = rng.integers(0, 255, (20, 16 + i, 3), dtype=np.uint8)
        Image.fromarray(numbers).save(folder / f"{i}.png")
        found.append({"image": str(folder / f"{i}.png"), "caption": "a cat" if i % 2 else "dog"})
    return found


def with_prediction(model, kind: str):
    scheduler = DDIMScheduler(clip_sample=False, prediction_type=kind, steps_offset=1)
    model.pipe.scheduler = scheduler
    return scheduler


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_diffusion_is_that_of_the_scheduler(models, kind):
    model = models["sd"]
    before = model.pipe.scheduler
    scheduler = with_prediction(model, kind)
    process = process_of(model)
    model.pipe.scheduler = before
    latents, noise = torch.randn(2, 4, 4, 8, 8)
    times = process.times(torch.tensor([0.0, 0.25, 0.5, 0.99999], dtype=torch.float64))
    assert times.tolist() == [0, 250, 500, 999]
    noisy, wanted, told = process.noisy(latents, noise, times)
    torch.testing.assert_close(noisy, scheduler.add_noise(latents, noise, times.long()))
    theirs = {
        "epsilon": noise,
        "sample": latents,
        "v_prediction": scheduler.get_velocity(latents, noise, times.long()),
    }
    torch.testing.assert_close(wanted, theirs[kind])
    assert told.dtype == torch.long


def test_a_flow_is_that_of_the_scheduler(models):
    scheduler = models["sd3"].pipe.scheduler
    process = process_of(models["sd3"])
    assert process.is_flow and process.shift == 3.0
    shares = torch.tensor([1.0, 0.5, 0.001], dtype=torch.float64)
    times = process.times(shares)
    places = [0, 500, 999]  # shares of a thousand, from the noisiest on
    torch.testing.assert_close(times.float(), scheduler.sigmas[places], atol=1e-5, rtol=1e-5)
    latents, noise = torch.randn(2, 3, 8, 8, 8)
    noisy, wanted, told = process.noisy(latents, noise, times)
    theirs = scheduler.scale_noise(latents, scheduler.timesteps[places], noise)
    torch.testing.assert_close(noisy, theirs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(told, scheduler.timesteps[places], atol=1e-2, rtol=1e-5)
    assert torch.equal(wanted, noise - latents)


def test_an_unknown_scheduler_is_refused(models):
    from diffusers import CMStochasticIterativeScheduler

    model = models["sd"]
    before, model.pipe.scheduler = model.pipe.scheduler, CMStochasticIterativeScheduler()
    with pytest.raises(BaseModelError, match="is not known, so there is no loss"):
        process_of(model)
    model.pipe.scheduler = before


def test_draws_depend_on_seed_epoch_and_record_alone(models, records):
    task = TextToImage(models["sd"])
    pictures = task.encode(records).examples

    def noise(picture, seed, epoch):
        (draw,) = draws_of(picture.drawn(seed, epoch))
        return draw.noise, draw.share

    first, again = noise(pictures[2], 7, 1), noise(task.encode(records).examples[2], 7, 1)
    assert torch.equal(first[0], again[0]) and first[1] == again[1]
    for other in (noise(pictures[2], 8, 1), noise(pictures[2], 7, 2), noise(pictures[3], 7, 1)):
        assert not torch.equal(first[0], other[0]) and first[1] != other[1]
    fixed = draws_of(pictures[2])
    assert [draw.share for draw in fixed] == [0.125, 0.375, 0.625, 0.875]
    assert len(fixed) == EVAL_DRAWS and torch.equal(fixed[0].latents, pictures[2].mean)


@pytest.mark.parametrize("kind", list(pipelines.MADE))
def test_the_loss_is_the_error_of_the_denoiser(models, records, kind):
    model = models[kind]
    task = TextToImage(model)
    picture = task.encode(records).examples[1].drawn(3, 0)
    (draw,) = draws_of(picture)
    process = process_of(model)
    times = process.times(torch.tensor([draw.share], dtype=torch.float64))
    noisy, wanted, told = process.noisy(draw.latents[None], draw.noise[None], times)
    with torch.no_grad():
        beside = conditions(model, [picture.caption], pipelines.SIDE)
        answer = model(noisy, timestep=told, **beside).sample
        expected = (answer - wanted).square().mean()
        (loss,) = task.losses(model, task.collate([[picture]], model))
        other = task.encode(records).examples[2].drawn(3, 0)
        (both,) = task.losses(model, task.collate([[picture, other]], model))
        (alone,) = task.losses(model, task.collate([[other]], model))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(both, loss + alone)


def test_an_evaluation_is_the_same_each_time_and_in_any_batch(models, records):
    task = TextToImage(models["sd"])
    pictures = task.encode(records).examples
    losses = [mean_loss(models["sd"], task, pictures, size) for size in (1, 2, 5, 5)]
    assert losses[2] == losses[3]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) == pytest.approx(losses[2], rel=1e-6)
    predictions = task.predict(models["sd"], records, batch_size=2)
    mean = sum(p.nll for p in predictions) / len(records)
    assert mean == pytest.approx(losses[0], rel=1e-6)
    assert predictions[0].record is records[0] and predictions[0].num_tokens == 1


def test_gradients_reach_the_text_encoder(tmp_path, records):
    model = lorica.load_model(
        pipelines.write("sd", tmp_path / "sd"), task="text-to-image", dtype="float32"
    )
    adapter = lorica.attach(model, lorica.LoRA(r=2, target_modules="text_encoder.*q_proj"))
    task = TextToImage(model)
    with lorica.activate(model, adapter):
        batch = task.collate([[task.encode(records).examples[0].drawn(0, 0)]], model)
        task.losses(model, batch)[0].backward()
    grads = [p.grad for n, p in adapter.named_parameters() if n.endswith(".B")]
    assert grads and all(g is not None and g.abs().max() > 0 for g in grads)


def test_what_a_record_is_goes_into_the_fingerprint(models, records):
    task = TextToImage(models["sd"])
    pictures = task.encode(records).examples
    other = [{**records[0], "caption": "god"}, *records[1:]]  # as many tokens
    assert fingerprint(pictures) == fingerprint(task.encode(records).examples)
    assert fingerprint(pictures) != fingerprint(task.encode(other).examples)
    smaller = TextToImage(models["sd"], resolution=8)
    assert fingerprint(pictures) != fingerprint(smaller.encode(records).examples)
    digest = hashlib.sha256(Path(records[0]["image"]).read_bytes()).hexdigest()
    told = [{**records[0], "sha256": digest}]
    assert task.encode(told).examples[0].content == pictures[0].content


def test_bad_settings_and_records_are_refused(models, records):
    with pytest.raises(ConfigError, match="a multiple of 4"):
        TextToImage(models["sd"], resolution=18)
    with pytest.raises(DataError, match="record 2: caption missing"):
        TextToImage(models["sd"]).encode([records[0], {"image": "x.png"}])
    found = TextToImage(models["sd"]).encode([{**records[0], "caption": "abc " * 30}])
    assert found.notes == ["1 captions cut to 12 tokens"]
