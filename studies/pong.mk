# Every run behind the README's Pong results, from the shipped teacher:
#
#     make -f studies/pong.mk -k          (about five hours on 2 CPU cores)
#
# Each target is a file, so an interrupted study continues with the same command, and a part can be
# asked for by name: teacher, distilled, direct, hurry, epochs, finetuned. `results` keeps what a
# report reads in docs/results/pong, `report` makes the report from there. Prerequisites are
# order-only: what exists is done, and no clock is compared.
.DELETE_ON_ERROR:
.SECONDARY:
.PHONY: all teacher distilled direct hurry epochs finetuned results report

DISTILL ?= .venv/bin/lightning-distill
PYTHON ?= .venv/bin/python
RUNS := runs/pong
RESULTS := docs/results/pong
SEEDS := 0 1 2
STUDENTS := medium low tiny
EVALUATE := $(DISTILL) evaluate --episodes 100

all: teacher distilled direct hurry epochs finetuned
	$(MAKE) -f studies/pong.mk report

# A run continues from its last checkpoint where it has one: $(call fit,RUN,FLAGS).
# `done` is written after it, because policy/last exists from the first checkpoint on.
fit = $(DISTILL) fit $(2) --trainer.default_root_dir $(1) \
	$$(if [ -f $(1)/checkpoints/last.ckpt ]; then echo --ckpt_path $(1)/checkpoints/last.ckpt; fi) \
	&& touch $(1)/done

# ---- the teacher that ships (configs/pong/teacher.yaml trains another), and a second seed of it
teacher: $(RUNS)/teacher/evaluation.json $(RUNS)/teacher_seed1/evaluation.json

$(RUNS)/teacher/evaluation.json:
	$(EVALUATE) --policy pretrained/pong --out $(@D)

$(RUNS)/teacher_seed1/done:
	$(call fit,$(RUNS)/teacher_seed1,--config configs/pong/teacher.yaml --seed_everything 1)

# ---- recordings; those for figure 3 are a quarter as long, with a tenth of random actions and without
collect = if [ -f $(@D)/progress.json ]; then $(DISTILL) collect --resume $(@D); \
	else $(DISTILL) collect --config configs/pong/collect.yaml --out $(@D) $(1); fi

$(RUNS)/dataset/manifest.json:
	$(call collect)

$(RUNS)/dataset_random/manifest.json:
	$(call collect,--steps 50000)

$(RUNS)/dataset_sampled/manifest.json:
	$(call collect,--steps 50000 --epsilon 0)

# ---- three capacities, three seeds
distilled: $(foreach s,$(SEEDS),$(foreach n,$(STUDENTS),$(RUNS)/distill_all_$(s)/evaluation/$(n)/evaluation.json))

$(RUNS)/distill_all_%/done: | $(RUNS)/dataset/manifest.json
	$(call fit,$(@D),--config configs/pong/distill_all.yaml --seed_everything $*)

define evaluate_student
$(RUNS)/distill_all_$(1)/evaluation/$(2)/evaluation.json: | $(RUNS)/distill_all_$(1)/done
	$(EVALUATE) --policy $(RUNS)/distill_all_$(1)/policy/$(2)/last --out $$(@D)
endef
$(foreach s,$(SEEDS),$(foreach n,$(STUDENTS),$(eval $(call evaluate_student,$(s),$(n)))))

# ---- medium and low trained directly: for the teacher's steps, and low in the student's time
direct: $(RUNS)/direct_medium/evaluation.json $(RUNS)/direct_low/evaluation.json
hurry: $(RUNS)/direct_low_hurry/evaluation.json

$(RUNS)/direct_%/done:
	$(call fit,$(@D),--config configs/pong/direct_$*.yaml)

# As many steps as fit into the wall time of collecting and distilling the low student.
HURRY_STEPS ?= 350000
$(RUNS)/direct_low_hurry/done:
	$(call fit,$(@D),--config configs/pong/direct_low.yaml --data.init_args.total_steps $(HURRY_STEPS))

# ---- return against epochs (figure 3): snapshots of one run per recording
EPOCHS := 1 2 5 10 20 50
RECORDINGS := random sampled
epochs: $(foreach d,$(RECORDINGS),$(foreach n,high medium low,$(foreach e,$(EPOCHS),$(RUNS)/epochs_$(d)/evaluation/$(n)_$(e)/evaluation.json)))

define epochs_of_recording
$(RUNS)/epochs_$(1)/done: | $(RUNS)/dataset_$(1)/manifest.json
	$$(call fit,$$(@D),--config configs/pong/epochs.yaml --data.init_args.path $(RUNS)/dataset_$(1))
endef
$(foreach d,$(RECORDINGS),$(eval $(call epochs_of_recording,$(d))))

define evaluate_epochs
$(RUNS)/epochs_$(1)/evaluation/$(2)_$(3)/evaluation.json: | $(RUNS)/epochs_$(1)/done
	$(DISTILL) evaluate --episodes 32 --policy $(RUNS)/epochs_$(1)/policy/$(2)/step_$(3) --out $$(@D)
endef
$(foreach d,$(RECORDINGS),$(foreach n,high medium low,$(foreach e,$(EPOCHS),$(eval $(call evaluate_epochs,$(d),$(n),$(e))))))

# ---- fine-tuning from a student stopped early, with and without warm-up and anchor
EARLY_EPOCHS ?= 2
FINETUNE := --config configs/pong/finetune.yaml --model.init_args.init_from $(RUNS)/early/policy/last \
	--data.init_args.teacher.init_args.path $(RUNS)/early/policy/last
# Variables, because a comma would end an argument of $(call).
TUNED_AFTER := --checkpoint.keep_steps [102400,110592,141312]
PLAIN_AFTER := --checkpoint.keep_steps [2048,10240,40960]
# 1, 5 and 20 rollouts of 2 048 steps after the warm-up, which ends with the rollout that reaches it.
finetuned: $(RUNS)/early/evaluation.json \
	$(foreach s,102400 110592 141312,$(RUNS)/finetune/evaluation/$(s)/evaluation.json) \
	$(foreach s,2048 10240 40960,$(RUNS)/finetune_plain/evaluation/$(s)/evaluation.json) \
	$(RUNS)/finetune/evaluation.json $(RUNS)/finetune_plain/evaluation.json

$(RUNS)/early/done: | $(RUNS)/dataset/manifest.json
	$(call fit,$(RUNS)/early,--config configs/pong/distill_low.yaml --trainer.max_epochs $(EARLY_EPOCHS))

$(RUNS)/finetune/done: | $(RUNS)/early/done
	$(call fit,$(RUNS)/finetune,$(FINETUNE) $(TUNED_AFTER))

$(RUNS)/finetune_plain/done: | $(RUNS)/early/done
	$(call fit,$(RUNS)/finetune_plain,$(FINETUNE) --model.init_args.critic_warmup_steps 0 \
		--model.init_args.distillation_loss null --data.init_args.teacher null \
		$(PLAIN_AFTER))

define evaluate_finetuned
$(RUNS)/$(1)/evaluation/$(2)/evaluation.json: | $(RUNS)/$(1)/done
	$(DISTILL) evaluate --episodes 30 --policy $(RUNS)/$(1)/policy/step_$(2) --out $$(@D)
endef
$(foreach s,102400 110592 141312,$(eval $(call evaluate_finetuned,finetune,$(s))))
$(foreach s,2048 10240 40960,$(eval $(call evaluate_finetuned,finetune_plain,$(s))))

# ---- a run with one policy is evaluated at its end
$(RUNS)/%/evaluation.json: | $(RUNS)/%/done
	$(EVALUATE) --policy $(@D)/policy/last --out $(@D)

# ---- what is kept of it, and what it shows
results:
	$(PYTHON) studies/keep.py $(RUNS) $(RESULTS)

report: results
	$(DISTILL) report $(RESULTS) --out $(RUNS)/report
