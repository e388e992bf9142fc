# On CartPole, three seeds each: students of 131 parameters by every loss from a recording and by every
# row of Czarnecki et al. 2019, and students that follow a DQN which is still learning; results for
# docs/methods.md:
#
#     OMP_NUM_THREADS=1 make -f studies/cartpole.mk -k        (about a hundred minutes of one CPU core)
#
# Each target is a file, so an interrupted study continues with the same command. Runs are called
# METHOD_mlp_SEED, and dqn_SEED and online_SEED.
.DELETE_ON_ERROR:
.SECONDARY:
.DEFAULT_GOAL := all
.PHONY: all recorded methods online results table

DISTILL ?= .venv/bin/lightning-distill
PYTHON ?= .venv/bin/python
RUNS := runs/cartpole_methods
RESULTS := docs/results/cartpole_methods
EVALUATE := $(DISTILL) evaluate
METHODS := $(basename $(notdir $(wildcard configs/landscape/*.yaml)))
SEEDS := 0 1 2

all: recorded methods online
	$(MAKE) -f studies/cartpole.mk table

$(RUNS)/run_teacher/done:
	rm -rf $(@D)
	$(DISTILL) fit --config configs/cartpole/teacher.yaml --trainer.default_root_dir $(@D)
	touch $@

$(RUNS)/teacher/%/evaluation.json: | $(RUNS)/run_teacher/done
	$(EVALUATE) $(if $(filter greedy,$*),--episodes 32 --greedy,--episodes 100) \
		--policy $(RUNS)/run_teacher/policy/last --out $(@D)

# ---- from a recording, by every loss of a policy: 1 000 updates, kept after 100 and 300
LOSSES := kl reverse_kl jensen_shannon hinton cross_entropy reverse_cross_entropy nll mse
CLASS_kl := ForwardKL
CLASS_reverse_kl := ReverseKL
CLASS_jensen_shannon := JensenShannon
CLASS_hinton := HintonKL
CLASS_cross_entropy := CrossEntropy
CLASS_reverse_cross_entropy := ReverseCrossEntropy
CLASS_nll := NegativeLogLikelihood
CLASS_mse := LogitsMSE

$(RUNS)/dataset/manifest.json: | $(RUNS)/run_teacher/done
	rm -rf $(@D)
	$(DISTILL) collect --config configs/cartpole/collect.yaml \
		--teacher $(RUNS)/run_teacher/policy/last --out $(@D)

define recording
$(RUNS)/$(1)_mlp_$(2)/done: | $(RUNS)/dataset/manifest.json
	rm -rf $$(@D)
	$(DISTILL) fit --config configs/cartpole/distill_low.yaml --data.init_args.path $(RUNS)/dataset \
		--model.init_args.losses '[{class_path: $(CLASS_$(1))}]' --model.init_args.one_cycle false \
		--model.init_args.optimizer.init_args.lr 3.0e-3 \
		--trainer.limit_train_batches 50 --trainer.check_val_every_n_epoch 2 \
		--evaluation.episodes 16 --evaluation.every_n_epochs 2 --checkpoint.monitor null \
		--checkpoint.every_n_epochs 2 --checkpoint.keep_steps [2,6] \
		--seed_everything $(2) --trainer.default_root_dir $$(@D)
	touch $$@

recorded: $(foreach e,sampled greedy step_2 step_6,$(RUNS)/$(1)_mlp_$(2)/evaluation/$(e)/evaluation.json)
endef
$(foreach l,$(LOSSES),$(foreach s,$(SEEDS),$(eval $(call recording,$(l),$(s)))))

# ---- by every row of the landscape
define method
$(RUNS)/$(1)_mlp_$(2)/done: | $(RUNS)/run_teacher/done
	rm -rf $$(@D)
	$(DISTILL) fit --config configs/cartpole/landscape.yaml --config configs/landscape/$(1).yaml \
		--data.init_args.teacher.init_args.path $(RUNS)/run_teacher/policy/last \
		--seed_everything $(2) --trainer.default_root_dir $$(@D) --checkpoint.monitor null \
		--checkpoint.keep_steps [5000,15000] --evaluation.every_n_steps 2500
	touch $$@

methods: $(foreach e,sampled greedy step_5000 step_15000,$(RUNS)/$(1)_mlp_$(2)/evaluation/$(e)/evaluation.json)
endef
$(foreach m,$(METHODS),$(foreach s,$(SEEDS),$(eval $(call method,$(m),$(s)))))

define evaluations
$(RUNS)/$(1)_mlp_$(2)/evaluation/sampled/evaluation.json: | $(RUNS)/$(1)_mlp_$(2)/done
	$(EVALUATE) --episodes 100 --policy $(RUNS)/$(1)_mlp_$(2)/policy/last --out $$(@D)

$(RUNS)/$(1)_mlp_$(2)/evaluation/greedy/evaluation.json: | $(RUNS)/$(1)_mlp_$(2)/done
	$(EVALUATE) --episodes 32 --greedy --policy $(RUNS)/$(1)_mlp_$(2)/policy/last --out $$(@D)

$(RUNS)/$(1)_mlp_$(2)/evaluation/step_%/evaluation.json: | $(RUNS)/$(1)_mlp_$(2)/done
	$(EVALUATE) --episodes 32 --policy $(RUNS)/$(1)_mlp_$(2)/policy/step_$$* --out $$(@D)
endef
$(foreach m,$(LOSSES) $(METHODS),$(foreach s,$(SEEDS),$(eval $(call evaluations,$(m),$(s)))))
recorded methods: $(foreach e,sampled greedy,$(RUNS)/teacher/$(e)/evaluation.json)

# ---- beside a DQN. Both at once; the student waits for the first policy that was evaluated.
define follow
$(RUNS)/online_$(1)/done:
	rm -rf $(RUNS)/dqn_$(1) $(RUNS)/online_$(1)
	$(DISTILL) fit --config configs/cartpole/dqn.yaml --seed_everything $(1) \
		--trainer.default_root_dir $(RUNS)/dqn_$(1) & teacher=$$$$!; \
	trap "kill $$$$teacher 2>/dev/null" EXIT; \
	while [ ! -e $(RUNS)/dqn_$(1)/policy/best ]; do kill -0 $$$$teacher || exit 1; sleep 0.2; done; \
	$(DISTILL) fit --config configs/cartpole/online.yaml --seed_everything $(1) \
		--data.init_args.teacher.init_args.path $(RUNS)/dqn_$(1)/policy/best \
		--trainer.default_root_dir $(RUNS)/online_$(1) && wait $$$$teacher && touch $$@

online: $(foreach r,dqn online,$(RUNS)/$(r)_$(1)/evaluation.json) $(RUNS)/dqn_$(1)/best/evaluation.json

$(RUNS)/dqn_$(1)/best/evaluation.json: | $(RUNS)/online_$(1)/done
	$(EVALUATE) --episodes 100 --policy $(RUNS)/dqn_$(1)/policy/best --out $$(@D)

$(RUNS)/dqn_$(1)/evaluation.json $(RUNS)/online_$(1)/evaluation.json: | $(RUNS)/online_$(1)/done
	$(EVALUATE) --episodes 100 --policy $$(@D)/policy/last --out $$(@D)
endef
$(foreach s,$(SEEDS),$(eval $(call follow,$(s))))

# The same at every update of the teacher, in one run.
define beside
$(RUNS)/real_time_dqn_$(1)/done:
	rm -rf $$(@D)
	$(DISTILL) fit --config configs/cartpole/real_time_dqn.yaml --seed_everything $(1) \
		--trainer.default_root_dir $$(@D)
	touch $$@

online: $(foreach p,policy student,$(RUNS)/real_time_dqn_$(1)/evaluation/$(p)/evaluation.json)

$(RUNS)/real_time_dqn_$(1)/evaluation/%/evaluation.json: | $(RUNS)/real_time_dqn_$(1)/done
	$(EVALUATE) --episodes 100 --policy $(RUNS)/real_time_dqn_$(1)/policy/$$*/last --out $$(@D)
endef
$(foreach s,$(SEEDS),$(eval $(call beside,$(s))))

results:
	$(PYTHON) studies/keep.py $(RUNS) $(RESULTS)

table: results
	$(PYTHON) -m studies.methods cartpole $(RESULTS)
	$(PYTHON) -m studies.pictures cartpole $(RESULTS)
