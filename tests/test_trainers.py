"""The training loops that others wrote, end to end and offline, around a model with adapters."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fused_lora import FusedLoRALinear, apply_lora, load_adapter, lora_parameters, save_adapter

STEPS, BATCH = 8, 4


@pytest.fixture(autouse=True)
def _one_plain_process(monkeypatch):
    """Each loop makes its own choices from the environment, and none may reach for a hub."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=40, max_position_embeddings=32, num_key_value_heads=2, **sizes)
    return LlamaForCausalLM(config)


def frozen_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}


def assert_only_the_adapters_moved(model, frozen):
    assert frozen
    for name, p in model.named_parameters():
        if name in frozen:
            assert torch.equal(p, frozen[name]), name
    assert all(bool(p.ne(0).any()) for p in lora_parameters(model))


def test_transformers_trainer_trains_checkpoints_and_resumes(tmp_path):
    from transformers import Trainer, TrainingArguments

    data = [{"input_ids": (row := torch.arange(start, start + 12) % 40), "labels": row} for start in range(32)]

    def trainer(model, folder, **options):
        arguments = TrainingArguments(
            output_dir=str(tmp_path / folder), max_steps=STEPS, save_steps=STEPS // 2, learning_rate=2e-2, bf16=True,
            per_device_train_batch_size=BATCH, gradient_accumulation_steps=2, use_cpu=True, gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": False}, report_to=[], disable_tqdm=True, logging_steps=1,
            dataloader_pin_memory=False, **options,
        )  # fmt: skip
        return Trainer(model=model, args=arguments, train_dataset=data)

    model = apply_lora(llama(), rank=4, alpha=8, dropout=0.05)
    frozen = frozen_of(model)
    first = trainer(model, "a")
    first.train()
    losses = [entry["loss"] for entry in first.state.log_history if "loss" in entry]
    assert sum(losses[-2:]) < 0.97 * sum(losses[:2])
    assert_only_the_adapters_moved(model, frozen)

    # a run that goes on from the middle ends where this one did
    other = apply_lora(llama(), rank=4, alpha=8, dropout=0.05)
    second = trainer(other, "b")
    second.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{STEPS // 2}"))
    for ours, theirs in zip(lora_parameters(other), lora_parameters(model), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)

    save_adapter(model, tmp_path / "adapter")
    fresh = load_adapter(llama(), tmp_path / "adapter")
    for ours, theirs in zip(lora_parameters(fresh), lora_parameters(model), strict=True):
        assert torch.equal(ours, theirs)


def regression():
    """A plain network, and data of the same network moved by a matrix of rank 2."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 6))
    x = torch.randn(64, 12)
    with torch.no_grad():
        y = net(x) + x @ torch.randn(12, 2) @ torch.randn(2, 6) * 0.3
    return net, TensorDataset(x, y)


def test_accelerate_trains_clips_and_restores_its_state(tmp_path):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    accelerator = Accelerator(mixed_precision="bf16", gradient_accumulation_steps=2, cpu=True)
    net, data = regression()
    model = apply_lora(net, rank=2)
    frozen = frozen_of(model)
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=2e-2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(data, BATCH))
    losses = []
    for _ in range(4):
        for x, y in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.mse_loss(model(x), y)
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8])
    plain = accelerator.unwrap_model(model)
    assert isinstance(plain[0], FusedLoRALinear)
    assert_only_the_adapters_moved(plain, frozen)

    trained = [p.detach().clone() for p in lora_parameters(plain)]
    accelerator.save_state(str(tmp_path))
    with torch.no_grad():
        for p in lora_parameters(plain):
            p.zero_()
    accelerator.load_state(str(tmp_path))
    assert all(torch.equal(one, two) for one, two in zip(trained, lora_parameters(plain), strict=True))
    AcceleratorState._reset_state(True)


def test_lightning_trains_and_its_checkpoint_restores(tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")

    class Task(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = apply_lora(regression()[0], rank=2)
            self.losses = []

        def training_step(self, batch, index):
            loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            return torch.optim.AdamW(lora_parameters(self.net), lr=2e-2)

    task, (_, data) = Task(), regression()
    frozen = frozen_of(task)
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, max_epochs=4, precision="bf16-mixed", gradient_clip_val=1.0, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(task, DataLoader(data, BATCH))
    assert sum(task.losses[-8:]) < 0.8 * sum(task.losses[:8])
    assert_only_the_adapters_moved(task, frozen)
    trainer.save_checkpoint(tmp_path / "task.ckpt")
    again = Task.load_from_checkpoint(tmp_path / "task.ckpt")
    for ours, theirs in zip(lora_parameters(again.net), lora_parameters(task.net), strict=True):
        assert torch.equal(ours, theirs)
