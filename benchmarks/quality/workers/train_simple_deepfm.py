"""Trains TorchRec's ``SimpleDeepFMNN`` on a prepared folder; ``table.py`` starts this, one process per training.

    python -m benchmarks.quality.workers.train_simple_deepfm DATA RESULT.json SETTINGS.json SEED

TorchRec has no training for this model: here Adam over all parameters, the best epoch by validation AUC, the rate
divided by ten when that does not rise, a stop after ``patience`` epochs without a rise. The model ends in a Sigmoid.
With ``loss`` "as is" its output is treated as a logit, as by TorchRec's ``SimpleDeepFMNNWrapper`` (the double sigmoid
of docs/model.md); with "fixed" as the probability that it is.
"""

import copy
from pathlib import Path
from typing import Any

import torch
import torchrec
from torch import Tensor
from torch.nn.functional import binary_cross_entropy, binary_cross_entropy_with_logits
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.models.deepfm import SimpleDeepFMNN

from benchmarks.quality.workers.prepared_arrays import Arrays, Clock, Split, run_worker, score, write

EVALUATION_BATCH = 16_384


def main(data: Path, result: Path, settings: dict[str, Any], seed: int) -> None:
    torch.set_num_threads(settings.get("threads", 1))
    torch.set_float32_matmul_precision(settings["precision"])
    torch.manual_seed(seed)
    arrays = Arrays.read(data)
    names = list(arrays.num_embeddings)
    tables = [
        EmbeddingBagConfig(
            name=f"t_{name}", feature_names=[name], num_embeddings=rows, embedding_dim=settings["embedding_dim"]
        )
        for name, rows in arrays.num_embeddings.items()
    ]
    model = SimpleDeepFMNN(
        num_dense_features=len(arrays.numeric),
        embedding_bag_collection=EmbeddingBagCollection(tables=tables),
        hidden_layer_size=settings["hidden_layer_size"],
        deep_fm_dimension=settings["deep_fm_dimension"],
    )
    as_is = settings["loss"] == "as is"
    loss_of = binary_cross_entropy_with_logits if as_is else binary_cross_entropy
    embeddings = list(model.sparse_arch.parameters())
    optimizer = torch.optim.Adam(model.parameters(), lr=settings["learning_rate"])

    def forward(split: Split, rows: Tensor | slice) -> Tensor:
        ids = torch.from_numpy(split.sparse)[rows]
        lengths = torch.ones(ids.numel(), dtype=torch.int32)
        features = KeyedJaggedTensor(keys=names, values=ids.t().reshape(-1), lengths=lengths)
        return model(torch.from_numpy(split.dense)[rows], features).squeeze(1)

    def predict(split: Split) -> Tensor:
        model.eval()
        with torch.no_grad():
            out = torch.cat([
                forward(split, slice(start, start + EVALUATION_BATCH))
                for start in range(0, len(split.labels), EVALUATION_BATCH)
            ])  # fmt: skip
        return torch.sigmoid(out) if as_is else out

    train = arrays.splits["train"]
    labels = torch.from_numpy(train.labels).float()
    clock, best, best_auc, waited, epochs = Clock(), model.state_dict(), 0.0, 0, 0
    while epochs < settings["epochs"] and waited < settings["patience"]:
        epochs += 1
        model.train()
        order = torch.randperm(len(labels))
        for rows in order.split(settings["batch_size"]):
            optimizer.zero_grad()
            loss = loss_of(forward(train, rows), labels[rows])
            if settings["embedding_l2"]:
                loss = loss + settings["embedding_l2"] / 2 * sum(weight.square().sum() for weight in embeddings)
            loss.backward()
            optimizer.step()
        auc = score(arrays.splits["validation"].labels, predict(arrays.splits["validation"]).numpy())["auc"]
        if auc > best_auc:
            best, best_auc, waited = copy.deepcopy(model.state_dict()), auc, 0
            continue
        waited += 1
        for group in optimizer.param_groups:
            group["lr"] *= 0.1
    model.load_state_dict(best)
    scores = arrays.held_out_scores(lambda split: predict(split).numpy())
    versions = {"torchrec": torchrec.__version__, "torch": torch.__version__}
    write(result, {**scores, "seconds": clock(), "epochs": epochs, "versions": versions})


if __name__ == "__main__":
    run_worker(main)
