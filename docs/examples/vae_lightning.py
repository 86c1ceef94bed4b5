"""A VAE of handwritten digits with PyTorch Lightning.

    python vae_lightning.py --epochs 20
    python vae_lightning.py --precision bf16-mixed
    python vae_lightning.py --accelerator cpu --devices 2 --strategy ddp    # or under torchrun

Needs vae_fast, lightning and scikit-learn.
"""

import argparse
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

import vae_fast


class Digits(L.LightningDataModule):
    """1437 training and 360 validation images, (1, 8, 8) in [0, 1]."""

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self.batch_size = batch_size
        images = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16
        self.parts = TensorDataset(images[:1437]), TensorDataset(images[1437:])

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.parts[0], self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.parts[1], self.batch_size)


class LitVAE(L.LightningModule):
    """A ``vae_fast.VAE`` whose loss, the negative ELBO in nats, Lightning minimises."""

    def __init__(self, latent_dim: int = 10, batch_size: int = 64, lr: float = 2e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.vae = vae_fast.VAE.mlp((1, 8, 8), latent_dim, hidden=(256, 128))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.vae.reconstruct(x)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        # Lightning seeds all processes alike, so all of them draw the same noise key, and without
        # first_row the rows of one process would get the noise of the rows of the others.
        out = self.vae(batch[0], first_row=self.global_rank * self.hparams.batch_size)
        self.log_dict(
            {"train_loss": out.loss, "train_nll": out.nll.mean(), "train_kl": out.kl.mean()},
            on_step=False,
            on_epoch=True,
            sync_dist=True,
        )
        return out.loss

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        # One key for all: epochs then differ by the model, not by the noise.
        key = torch.tensor([0, 0], dtype=torch.uint64, device=self.device)
        index = batch_idx * self.trainer.world_size + self.global_rank
        out = self.vae(batch[0], key=key, first_row=index * self.hparams.batch_size)
        self.log_dict(
            {"val_loss": out.loss, "val_nll": out.nll.mean(), "val_kl": out.kl.mean()},
            sync_dist=True,
            batch_size=len(batch[0]),
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.hparams.lr)


def main(arguments: list[str] | None = None) -> LitVAE:
    """Train, reload the best checkpoint, and print its validation ELBO."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=64, help="of each process")
    parser.add_argument("--latent-dim", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", default="32-true", help="32-true, bf16-mixed, 16-mixed")
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--devices", default="auto")
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--folder", type=Path, default=Path("runs/lightning"))
    args = parser.parse_args(arguments)

    L.seed_everything(args.seed)
    digits = Digits(args.batch_size)
    model = LitVAE(args.latent_dim, args.batch_size)
    checkpoint = ModelCheckpoint(
        args.folder, "best", monitor="val_loss", enable_version_counter=False
    )
    trainer = L.Trainer(
        max_epochs=args.epochs,
        precision=args.precision,
        accelerator=args.accelerator,
        devices=args.devices,
        strategy=args.strategy,
        logger=CSVLogger(args.folder, name="", version=""),
        callbacks=[checkpoint],
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, digits)

    best = LitVAE.load_from_checkpoint(checkpoint.best_model_path)
    (metrics,) = trainer.validate(best, digits, verbose=False)
    if trainer.is_global_zero:
        print(f"validation ELBO: {-metrics['val_loss']:.2f} nats")
    trainer.strategy.barrier()  # or one that ends may leave another waiting
    if torch.distributed.is_initialized():  # or gloo's threads may abort it as it ends
        torch.distributed.destroy_process_group()
    return best


if __name__ == "__main__":
    main()
