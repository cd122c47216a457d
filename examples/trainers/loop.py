import torch
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from logitcask import Distillation

model = AutoModelForCausalLM.from_pretrained("my-student", dtype=torch.float32)
distillation = Distillation(
    model,
    AutoTokenizer.from_pretrained("my-student"),
    cache="caches/mine",
    losses=[{"name": "forward_kl"}, {"name": "ranking", "weight": 2.0, "k": 5}],
    ce_weight=0.5,
)
# A batch of the loader is an optimizer step: here 16 sequences, as micro-batches of 4.
loader = DataLoader(
    distillation.train, batch_size=16, shuffle=True, collate_fn=distillation.micro_batches(4)
)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)

model.train()
for step in loader:
    positions = sum(len(batch["kept"]) for batch in step)
    total = 0.0
    for batch in send_to_device(step, model.device):
        outputs = model(**distillation.inputs(batch))
        loss = distillation.loss(outputs, batch, positions)
        loss.backward()
        total += loss.item()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    print(f"loss {total:.4f}")
model.save_pretrained("runs/loop")
