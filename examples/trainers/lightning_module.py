import lightning
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from logitcask import Distillation


class Student(lightning.LightningModule):
    def __init__(self, model, distillation):
        super().__init__()
        self.model, self.distillation = model, distillation
        self.automatic_optimization = False  # Lightning's accumulation is a mean of means

    def training_step(self, step, number):
        optimizer = self.optimizers()
        own = torch.tensor(sum(len(batch["kept"]) for batch in step), device=self.device)
        positions = self.all_gather(own).float().mean()  # DDP averages gradients over processes
        total = torch.zeros((), device=self.device)
        for batch in step:
            outputs = self.model(**self.distillation.inputs(batch))
            loss = self.distillation.loss(outputs, batch, positions)
            self.manual_backward(loss)
            total += loss.detach()
        self.clip_gradients(optimizer, gradient_clip_val=1.0)
        optimizer.step()
        optimizer.zero_grad()
        self.log("loss", total, prog_bar=True, batch_size=int(own))

    def validation_step(self, batch, number):
        loss = self.distillation.loss(self.model(**self.distillation.inputs(batch)), batch)
        self.log("held_out_loss", loss, batch_size=len(batch["kept"]))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-4, weight_decay=0.0)


model = AutoModelForCausalLM.from_pretrained("my-student", dtype=torch.float32).train()
distillation = Distillation(
    model,
    AutoTokenizer.from_pretrained("my-student"),
    cache="caches/mine",
    losses=[{"name": "forward_kl"}, {"name": "ranking", "weight": 2.0, "k": 5}],
    ce_weight=0.5,
)
steps = DataLoader(
    distillation.train, batch_size=16, shuffle=True, collate_fn=distillation.micro_batches(4)
)
held_out = DataLoader(distillation.held_out, batch_size=4, collate_fn=distillation.collate)
trainer = lightning.Trainer(max_epochs=1, log_every_n_steps=1, default_root_dir="runs/lightning")
trainer.fit(Student(model, distillation), steps, held_out)
model.save_pretrained("runs/lightning")
