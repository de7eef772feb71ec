"""Adds the control tokens of Thinkless to a model and teaches it to use both, with TRL's SFTTrainer.

    python "$(trl_ext recipes --path)/warmup/thinkless.py" --config my_warmup.yaml

Takes the options and YAML keys of `trl sft`, and thinkless.yaml beside this file has the authors' settings. The data
have the columns `prompt` (text or messages), `short` (a direct answer) and `think` (thoughts, `</think>`, answer).
Prompts are rendered as GRPO will render them, so the model learns to choose at the place where reinforcement learning
lets it choose.
"""

from __future__ import annotations

from typing import Any

from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer, TrlParser

from trl_ext_plugins.thinkless import add_control_tokens, warmup_rows


def main(data: ScriptArguments, args: SFTConfig, config: ModelConfig) -> None:
    if config.use_peft:
        raise SystemExit("the embeddings of new tokens have to be trained: leave use_peft out")
    tokenizer = AutoTokenizer.from_pretrained(config.model_name_or_path, revision=config.model_revision)
    model = AutoModelForCausalLM.from_pretrained(
        config.model_name_or_path, revision=config.model_revision, dtype=config.dtype or "float32"
    )
    print(f"added to the tokenizer: {', '.join(add_control_tokens(model, tokenizer)) or 'nothing'}")
    examples = load_dataset(data.dataset_name, name=data.dataset_config, split=data.dataset_train_split)
    rendered = ({**example, "prompt": render(tokenizer, example["prompt"])} for example in examples)
    rows = Dataset.from_list([row for example in rendered for row in warmup_rows(example)]).shuffle(seed=args.seed)
    trainer = SFTTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    trainer.save_model(args.output_dir)
    print(f"saved to {args.output_dir}")


def render(tokenizer: Any, prompt: Any) -> str:
    """The text that GRPO lets the model continue; the trainer adds the first token of a text itself."""
    if isinstance(prompt, str):
        return prompt
    text: str = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    opening = text.rpartition(prompt[-1]["content"])[2]
    if any(token in opening for token in ("<think>", "<short>", "</think>")):
        raise SystemExit(f"the chat template writes the mode itself ({opening!r}); use one that leaves it to the model")
    return text.removeprefix(tokenizer.bos_token or "")


if __name__ == "__main__":
    main(*TrlParser((ScriptArguments, SFTConfig, ModelConfig)).parse_args_and_config())
