"""A VAE of handwritten digits with Hugging Face Accelerate.

    python vae_accelerate.py --epochs 20
    python vae_accelerate.py --mixed-precision bf16
    accelerate launch --num_processes 2 vae_accelerate.py                   # on GPUs
    torchrun --nproc-per-node 2 vae_accelerate.py --cpu                     # on CPUs
    python vae_accelerate.py --resume                                       # from the saved state

Needs vae_fast, accelerate and scikit-learn.
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

import vae_fast


def digits(batch_size: int) -> tuple[DataLoader, DataLoader]:
    """1437 training and 360 validation images, (1, 8, 8) in [0, 1]."""
    images = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16
    training, validation = TensorDataset(images[:1437]), TensorDataset(images[1437:])
    return (
        DataLoader(training, batch_size, shuffle=True, drop_last=True),
        DataLoader(validation, batch_size),
    )


@torch.no_grad()
def validation_loss(
    accelerator: Accelerator, vae: torch.nn.Module, batches: DataLoader, batch_size: int
) -> float:
    """Mean negative ELBO of the validation images, in nats."""
    # One key for all: epochs then differ by the model, not by the noise.
    key = torch.tensor([0, 0], dtype=torch.uint64, device=accelerator.device)
    vae.eval()
    losses = []
    for i, (x,) in enumerate(batches):
        index = i * accelerator.num_processes + accelerator.process_index
        out = vae(x, key=key, first_row=index * batch_size)
        losses.append(accelerator.gather_for_metrics(out.nll + out.kl))
    return torch.cat(losses).mean().item()


def main(arguments: list[str] | None = None) -> vae_fast.VAE:
    """Train, save and reload the state, and print the validation ELBO."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=32, help="of each process")
    parser.add_argument("--accumulate", type=int, default=2, help="batches a step")
    parser.add_argument("--latent-dim", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mixed-precision", default="no", choices=("no", "bf16", "fp16"))
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--folder", type=Path, default=Path("runs/accelerate"))
    args = parser.parse_args(arguments)

    accelerator = Accelerator(
        cpu=args.cpu,
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.accumulate,
    )
    # A seed of each process's own (seed + rank), and with it noise keys of its own. With one seed
    # for all, every process would draw the same key, and its rows the noise of the others' rows.
    # The weights may differ at first: prepare() sends those of process 0 to all.
    set_seed(args.seed, device_specific=True)
    vae = vae_fast.VAE.mlp((1, 8, 8), args.latent_dim, hidden=(256, 128))
    optimizer = torch.optim.Adam(vae.parameters(), lr=2e-3)
    vae, optimizer, training, validation = accelerator.prepare(
        vae, optimizer, *digits(args.batch_size)
    )
    state = args.folder / "state"
    if args.resume:
        accelerator.load_state(state)

    for epoch in range(args.epochs):
        vae.train()
        total = torch.zeros((), device=accelerator.device)
        for (x,) in training:
            with accelerator.accumulate(vae):
                loss = vae(x).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            total += loss.detach()
        mean = accelerator.reduce(total / len(training), "mean").item()
        accelerator.print(f"epoch {epoch + 1}: training loss {mean:.2f} nats")
    # The model, the optimizer, and every process's random generators: noise keys go on from there.
    accelerator.save_state(state)

    loss = validation_loss(accelerator, vae, validation, args.batch_size)
    accelerator.print(f"validation ELBO: {-loss:.2f} nats")
    model = accelerator.unwrap_model(vae)
    if accelerator.is_main_process:
        model.save(args.folder / "model.safetensors")  # for vae_fast.VAE.load
    accelerator.wait_for_everyone()  # or one that ends may leave another waiting for ever
    # So may DistributedDataParallel, if it is the last to let go of the process group: it keeps
    # Python's lock then, which gloo's thread needs to end.
    vae, optimizer = accelerator.free_memory(vae, optimizer)
    accelerator.end_training()
    return model


if __name__ == "__main__":
    main()
