"""What does int8 by torchao cost in agreement of the features, and gain in time, on this machine?

    pip install torchao
    python benchmarks/quantised.py checkpoints/fusmae-tiny

Ways take turns within each round on simulated pairs; medians over the rounds are compared. Agreement is the cosine of
the pooled features of each pair to those in float32: the least and the mean.
"""

import argparse
import statistics
import time

import torch
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig
from transformers import TorchAoConfig

from fusmae_hf import FusMAEImageProcessor, FusMAEModel, SimulatedPairs, SimulationOptions


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--batch_size", type=int, default=8, help="pairs (default 8)")
    parser.add_argument("--rounds", type=int, default=5, help="measured ones, after one of warm-up (default 5)")
    arguments = parser.parse_args()
    ways = {"float32": None, "int8 weights": Int8WeightOnlyConfig(), "int8": Int8DynamicActivationInt8WeightConfig()}
    models = {}
    for name, quantised in ways.items():
        options = {} if quantised is None else {"quantization_config": TorchAoConfig(quantised)}
        models[name] = FusMAEModel.from_pretrained(arguments.checkpoint, **options).eval()
    size = models["float32"].config.image_height_width[0]
    pairs = SimulatedPairs(arguments.batch_size, options=SimulationOptions(image_size=size))
    read = [pairs.read(number) for number in range(arguments.batch_size)]
    processor = FusMAEImageProcessor.from_pretrained(arguments.checkpoint)
    inputs = processor(optical=[pair.optical for pair in read], sar=[pair.sar for pair in read])
    seconds: dict[str, list[float]] = {name: [] for name in models}
    features = {}
    with torch.inference_mode():
        for _ in range(arguments.rounds + 1):
            for name, model in models.items():
                start = time.perf_counter()
                features[name] = model(**inputs).pooler_output
                seconds[name].append(time.perf_counter() - start)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.batch_size} pairs of {size} px\n")
    print("| way | pairs/s | speed | least cosine | mean cosine |\n|---|---|---|---|---|")
    reference = statistics.median(seconds["float32"][1:])
    for name, measured in seconds.items():
        median = statistics.median(measured[1:])  # the first round warms up
        cosine = torch.nn.functional.cosine_similarity(features[name], features["float32"])
        print(
            f"| {name} | {arguments.batch_size / median:.1f} | {reference / median:.2f}x | {cosine.min():.5f} "
            f"| {cosine.mean():.5f} |"
        )


if __name__ == "__main__":
    main()
