#!/bin/sh
# Agreement on answers as the reward of verl's GRPO, without labels: sh examples/verl_grpo.sh MODEL train.parquet
# (verl gives a reward no model, so that the recipe `default`, which also judges the reasoning steps, cannot be paid.)
#
# Rows of train.parquet: `prompt` (the turns of a chat, whose text asks for the form that the reward reads, as
# ireasoner.method.texts.SOLVER_PROMPT does, and has <image> where the image is), `images` (a list of one), `data_source`
# (any name), `reward_model` (an object; `ground_truth` in it is only measured) and `extra_info` (with `question`).
set -e
python -m verl.trainer.main_ppo \
    algorithm.adv_estimator=grpo \
    data.train_files="$2" data.val_files="$2" data.image_key=images data.train_batch_size=64 \
    data.max_prompt_length=2048 data.max_response_length=512 \
    actor_rollout_ref.model.path="$1" \
    actor_rollout_ref.rollout.name=vllm actor_rollout_ref.rollout.n=8 \
    actor_rollout_ref.actor.ppo_mini_batch_size=64 actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4 \
    reward.num_workers=1 \
    reward.reward_manager.source=importlib \
    reward.reward_manager.module.path=pkg://ireasoner.plugins.verl \
    reward.reward_manager.name=AgreementRewardManager \
    +reward.reward_kwargs.recipe=answers-only \
    trainer.val_before_train=False trainer.test_freq=-1 \
    trainer.n_gpus_per_node=1 trainer.total_training_steps=100 'trainer.logger=[console]'
