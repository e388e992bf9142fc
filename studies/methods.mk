# Every method on Pong from one teacher, the shipped one; results for docs/methods.md:
#
#     make -f studies/methods.mk -k            (about thirteen hours of one CPU core)
#     OMP_NUM_THREADS=1 make -f studies/methods.mk -k -j2     (two trainings at a time)
#
# Runs are called METHOD_SIZE_SEED. Each target is a file, so an interrupted study continues with the
# same command; `make -f studies/methods.mk kl_tiny_0` asks for one run, `offline`, `acting` and
# `real_time` for some. `results` keeps what `table` reads in docs/results/methods.
.DELETE_ON_ERROR:
.SECONDARY:
.DEFAULT_GOAL := all
.PHONY: all offline acting real_time results table

DISTILL ?= .venv/bin/lightning-distill
PYTHON ?= .venv/bin/python
RUNS ?= runs/methods
DATASET ?= runs/pong/dataset
RESULTS := docs/results/methods
EVALUATE := $(DISTILL) evaluate

# A run continues from its last checkpoint where it has one: $(call fit,RUN,FLAGS).
fit = $(DISTILL) fit $(2) --trainer.default_root_dir $(1) \
	$$(if [ -f $(1)/checkpoints/last.ckpt ]; then echo --ckpt_path $(1)/checkpoints/last.ckpt; fi) \
	&& touch $(1)/done

# Three seeds of 1.7 % of the teacher's parameters, one of 7 %.
STUDENTS := tiny_0 tiny_1 tiny_2 low_0
size = $(word 1,$(subst _, ,$(1)))
seed = $(word 2,$(subst _, ,$(1)))

# $(call evaluations,RUN,KEPT): its last policy sampled and greedy, and those kept on the way.
define evaluations
$(1): $(RUNS)/$(1)/evaluation/sampled/evaluation.json $(RUNS)/$(1)/evaluation/greedy/evaluation.json \
	$(foreach k,$(2),$(RUNS)/$(1)/evaluation/step_$(k)/evaluation.json)

$(RUNS)/$(1)/evaluation/sampled/evaluation.json: | $(RUNS)/$(1)/done
	$(EVALUATE) --episodes 100 --policy $(RUNS)/$(1)/policy/last --out $$(@D)

$(RUNS)/$(1)/evaluation/greedy/evaluation.json: | $(RUNS)/$(1)/done
	$(EVALUATE) --episodes 32 --greedy --policy $(RUNS)/$(1)/policy/last --out $$(@D)

$(RUNS)/$(1)/evaluation/step_%/evaluation.json: | $(RUNS)/$(1)/done
	$(EVALUATE) --episodes 32 --policy $(RUNS)/$(1)/policy/step_$$* --out $$(@D)
endef

# ---- from the recording: kept after 2 000, 10 000 and 40 000 updates, in epochs of 500
LOSSES := kl reverse_kl nll mse
CLASS_kl := ForwardKL
CLASS_reverse_kl := ReverseKL
CLASS_nll := NegativeLogLikelihood
CLASS_mse := LogitsMSE
# The other two sizes, 25 and 4 %, for the curve of compression.
OFFLINE := $(foreach l,$(LOSSES),$(foreach s,$(STUDENTS),$(l)_$(s))) kl_net3_0 kl_medium_0

$(DATASET)/manifest.json:
	if [ -f $(@D)/progress.json ]; then $(DISTILL) collect --resume $(@D); \
	else $(DISTILL) collect --config configs/pong/collect.yaml --out $(@D); fi

define distil
$(RUNS)/$(1)_$(2)/done: | $(DATASET)/manifest.json
	$$(call fit,$$(@D),--config configs/pong/methods.yaml --data.init_args.path $(DATASET) \
		--model.init_args.losses '[{class_path: $(CLASS_$(1))}]' --seed_everything $(call seed,$(2)) \
		--model.init_args.students '{student: configs/network/$(call size,$(2)).yaml}')
$(call evaluations,$(1)_$(2),4 20)
endef
$(foreach l,$(LOSSES),$(foreach s,$(STUDENTS),$(eval $(call distil,$(l),$(s)))))
$(foreach s,net3_0 medium_0,$(eval $(call distil,kl,$(s))))

# ---- where the student acts, for 400 000 agent steps
LANDSCAPE := on_policy_distill exp_entropy_regularised n_distill
PRESETS := ppd kickstarting
ACTING := $(foreach m,$(LANDSCAPE) $(PRESETS) dagger,$(foreach s,$(STUDENTS),$(m)_$(s)))
KEEP := --checkpoint.keep_steps [50000,100000,200000] --checkpoint.monitor null --evaluation.every_n_steps 25000

define act
$(RUNS)/$(1)_$(3)/done:
	$$(call fit,$$(@D),$(2) $$(KEEP) --seed_everything $(call seed,$(3)) --data.init_args.num_threads 1)
$(call evaluations,$(1)_$(3),50000 100000 200000)
endef
network = --model.init_args.network configs/network/$(call size,$(1)).yaml
$(foreach m,$(LANDSCAPE),$(foreach s,$(STUDENTS),$(eval $(call act,$(m),--config \
	configs/pong/landscape.yaml --config configs/landscape/$(m).yaml $(call network,$(s)),$(s)))))
$(foreach m,$(PRESETS),$(foreach s,$(STUDENTS),$(eval $(call act,$(m),--config \
	configs/pong/$(m).yaml $(call network,$(s)),$(s)))))
$(foreach s,$(STUDENTS),$(eval $(call act,dagger,--config configs/pong/dagger.yaml \
	--model.init_args.students '{student: configs/network/$(call size,$(s)).yaml}',$(s))))

# ---- beside a teacher that learns: all four sizes in a run, three seeds
REAL_TIME := $(foreach s,0 1 2,real_time_$(s))

define real_time_run
$(RUNS)/real_time_$(1)/done:
	$$(call fit,$$(@D),--config configs/pong/real_time.yaml --seed_everything $(1) \
		--data.init_args.num_threads 1)

real_time_$(1): $(foreach p,policy medium low net3 tiny,$(foreach e,sampled greedy,\
	$(RUNS)/real_time_$(1)/evaluation/$(p)_$(e)/evaluation.json))

$(RUNS)/real_time_$(1)/evaluation/%_sampled/evaluation.json: | $(RUNS)/real_time_$(1)/done
	$(EVALUATE) --episodes 100 --policy $(RUNS)/real_time_$(1)/policy/$$*/last --out $$(@D)

$(RUNS)/real_time_$(1)/evaluation/%_greedy/evaluation.json: | $(RUNS)/real_time_$(1)/done
	$(EVALUATE) --episodes 32 --greedy --policy $(RUNS)/real_time_$(1)/policy/$$*/last --out $$(@D)
endef
$(foreach s,0 1 2,$(eval $(call real_time_run,$(s))))

# ---- the teacher as measure
$(RUNS)/teacher/%/evaluation.json:
	$(EVALUATE) $(if $(filter greedy,$*),--episodes 32 --greedy,--episodes 100) --policy pretrained/pong --out $(@D)

teacher: $(RUNS)/teacher/sampled/evaluation.json $(RUNS)/teacher/greedy/evaluation.json
offline: $(OFFLINE)
acting: $(ACTING)
real_time: $(REAL_TIME)
.PHONY: teacher $(OFFLINE) $(ACTING) $(REAL_TIME)
all: teacher offline acting real_time
	$(MAKE) -f studies/methods.mk table

# ---- what is kept of it, and what it shows
results:
	$(PYTHON) -m studies.methods agree $(RUNS) $(DATASET) $(RESULTS)
	$(PYTHON) studies/keep.py $(RUNS) $(RESULTS)

table: results
	$(PYTHON) -m studies.methods table $(RESULTS)
