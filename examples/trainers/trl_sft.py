import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from logitcask import Distillation, DistillationMixin


class DistillingTrainer(DistillationMixin, SFTTrainer):
    pass


model = AutoModelForCausalLM.from_pretrained("my-student", dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained("my-student")
distillation = Distillation(
    model,
    tokenizer,
    cache="caches/mine",
    losses=[{"name": "forward_kl"}, {"name": "ranking", "weight": 2.0, "k": 5}],
    ce_weight=0.5,
)
args = SFTConfig(
    output_dir="runs/trl",
    num_train_epochs=1,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=4,
    learning_rate=1e-4,
    lr_scheduler_type="constant",
    logging_steps=1,
    eval_strategy="epoch",
)
trainer = DistillingTrainer(model, args, distillation=distillation, processing_class=tokenizer)
trainer.train()
trainer.save_model()
