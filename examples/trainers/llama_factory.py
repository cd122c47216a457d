from datasets import DatasetDict, load_dataset


def labelled(row):
    labels = [
        token if learnt else -100
        for token, learnt in zip(row["input_ids"], row["loss_mask"], strict=True)
    ]
    return {"attention_mask": [1] * len(labels), "labels": labels}


rows = load_dataset("arrow", data_files="caches/mine/data/*.arrow", split="train")
rows = rows.select_columns(["input_ids", "loss_mask"]).map(labelled, remove_columns="loss_mask")
DatasetDict({"train": rows}).save_to_disk("tokenized/mine")
