# Every method on Pong, from the shipped teachers but for real-time, which trains its own, and three
# games at once; results for docs/methods.md:
#
#     make -f studies/methods.mk -k            (about a day of one CPU core)
#     make -f studies/methods.mk -k -j2        (two trainings at a time)
#
# Runs are called METHOD_SIZE_SEED. Each target is a file, so an interrupted study continues with the
# same command; `make -f studies/methods.mk kl_tiny_0` asks for one run, `offline`, `acting`,
# `corrupted`, `real_time`, `dqn` and `three_games` for some. `results` keeps what `table` reads in docs/results.
.DELETE_ON_ERROR:
.SECONDARY:
.DEFAULT_GOAL := all
.PHONY: all offline acting corrupted real_time dqn three_games results table

# Minutes in the tables are those of one core.
export OMP_NUM_THREADS ?= 1

DISTILL ?= .venv/bin/lightning-distill
PYTHON ?= .venv/bin/python
RUNS ?= runs/methods
DATASET ?= runs/pong/dataset
RESULTS := docs/results/methods
EVALUATE := $(DISTILL) evaluate

# A run continues from its last checkpoint, or begins anew where it has none: $(call fit,RUN,FLAGS).
fit = if [ ! -f $(1)/checkpoints/last.ckpt ]; then rm -rf $(1); fi; $(DISTILL) fit $(2) --trainer.default_root_dir $(1) \
	$$(if [ -f $(1)/checkpoints/last.ckpt ]; then echo --ckpt_path $(1)/checkpoints/last.ckpt; fi) \
	&& touch $(1)/done

# Three seeds of 1.7 % of the teacher's parameters, one of 6 %.
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
KEEP := --checkpoint.keep_steps [50000,100000,200000] --checkpoint.monitor null --evaluation.every_n_steps 50000

define act
$(RUNS)/$(1)_$(3)/done:
	$(4)
	$$(call fit,$$(@D),$(2) $$(KEEP) --seed_everything $(call seed,$(3)) --data.init_args.num_threads 1)
$(call evaluations,$(1)_$(3),50000 100000 200000)
endef
network = --model.init_args.network configs/network/$(call size,$(1)).yaml
# As the header of configs/pong/landscape.yaml says.
FLAGS_n_distill := --model.init_args.gamma 0.5
FLAGS_exp_entropy_regularised := --model.init_args.gamma 0.5 --model.init_args.ent_coef 0.05
$(foreach m,$(LANDSCAPE),$(foreach s,$(STUDENTS),$(eval $(call act,$(m),--config \
	configs/pong/landscape.yaml --config configs/landscape/$(m).yaml $(FLAGS_$(m)) $(call network,$(s)),$(s)))))
# The 6.4 % of seed 0 died in its first updates.
ACTING += on_policy_distill_low_1
$(eval $(call act,on_policy_distill,--config configs/pong/landscape.yaml \
	--config configs/landscape/on_policy_distill.yaml $(call network,low_1),low_1))
$(foreach m,$(PRESETS),$(foreach s,$(STUDENTS),$(eval $(call act,$(m),--config \
	configs/pong/$(m).yaml $(call network,$(s)),$(s)))))
# DAgger's memory is not part of a checkpoint: it begins anew. Epochs of two turns, as others have.
$(foreach s,$(STUDENTS),$(eval $(call act,dagger,--config configs/pong/dagger.yaml \
	--data.init_args.epoch_steps 1024 \
	--model.init_args.students '{student: configs/network/$(call size,$(s)).yaml}',$(s),rm -rf $$(@D))))

# ---- from a teacher with corrupted weights: who learns what it does, and who learns to play
CORRUPTED := $(foreach m,teacher_distill on_policy_distill ppd,$(foreach s,low_0 low_1,corrupted_$(m)_$(s)))
corrupted_policy = $(RUNS)/corrupted/policy

$(corrupted_policy)/config.json:
	$(PYTHON) -m studies.corrupt pretrained/pong 0.05 $(@D)

$(RUNS)/corrupted/evaluation.json: | $(corrupted_policy)/config.json
	$(EVALUATE) --episodes 100 --policy $(corrupted_policy) --out $(@D)

$(foreach r,$(CORRUPTED),$(eval $(RUNS)/$(r)/done: | $(corrupted_policy)/config.json))
$(foreach s,low_0 low_1,$(foreach m,teacher_distill on_policy_distill,$(eval $(call act,corrupted_$(m),\
	--config configs/pong/landscape.yaml --config configs/landscape/$(m).yaml $(call network,$(s)) \
	--data.init_args.teacher.init_args.path $(corrupted_policy),$(s)))))
$(foreach s,low_0 low_1,$(eval $(call act,corrupted_ppd,--config configs/pong/ppd.yaml \
	$(call network,$(s)) --data.init_args.teacher.init_args.path $(corrupted_policy),$(s))))

# ---- beside a teacher that learns: all four sizes with seed 0, the smallest with three
REAL_TIME := $(foreach s,0 1 2,real_time_$(s))
BESIDE_0 := medium low net3 tiny
BESIDE_1 := tiny
BESIDE_2 := tiny
# After 2 000 and 10 000 updates.
EARLY_REAL_TIME := 128000 640000
KEEP_REAL_TIME := --checkpoint.keep_steps [128000,640000]

define real_time_run
beside_$(1) := {$(foreach p,$(BESIDE_$(1)),$(p): configs/network/$(p).yaml,)}

$(RUNS)/real_time_$(1)/done:
	$$(call fit,$$(@D),--config configs/pong/real_time.yaml --seed_everything $(1) \
		$$(KEEP_REAL_TIME) --model.init_args.students '$$(beside_$(1))' --data.init_args.num_threads 1)

real_time_$(1): $(foreach p,policy $(BESIDE_$(1)),$(foreach e,sampled greedy $(EARLY_REAL_TIME:%=step_%),\
	$(RUNS)/real_time_$(1)/evaluation/$(p)_$(e)/evaluation.json))

$(RUNS)/real_time_$(1)/evaluation/%_sampled/evaluation.json: | $(RUNS)/real_time_$(1)/done
	$(EVALUATE) --episodes 100 --policy $(RUNS)/real_time_$(1)/policy/$$*/last --out $$(@D)

$(RUNS)/real_time_$(1)/evaluation/%_greedy/evaluation.json: | $(RUNS)/real_time_$(1)/done
	$(EVALUATE) --episodes 32 --greedy --policy $(RUNS)/real_time_$(1)/policy/$$*/last --out $$(@D)
endef
$(foreach s,0 1 2,$(eval $(call real_time_run,$(s))))

define real_time_early
$(RUNS)/real_time_$(1)/evaluation/%_step_$(2)/evaluation.json: | $(RUNS)/real_time_$(1)/done
	$(EVALUATE) --episodes 32 --policy $(RUNS)/real_time_$(1)/policy/$$*/step_$(2) --out $$(@D)
endef
$(foreach s,0 1 2,$(foreach n,$(EARLY_REAL_TIME),$(eval $(call real_time_early,$(s),$(n)))))

# ---- Q-values (Rusu et al. 2016): three sizes from the shipped DQN teacher by KL, NLL and MSE; that
# one is from configs/pong/dqn.yaml
dqn: $(foreach r,dqn $(foreach l,kl nll mse,$(foreach n,net1 net2 net3,dqn_$(l)/$(n))),\
	$(foreach e,epsilon greedy,$(RUNS)/$(r)/evaluation_$(e)/evaluation.json))

$(RUNS)/dqn/evaluation_epsilon/evaluation.json:
	$(EVALUATE) --episodes 100 --policy pretrained/pong_dqn --epsilon 0.05 --out $(@D)

$(RUNS)/dqn/evaluation_greedy/evaluation.json:
	$(EVALUATE) --episodes 32 --policy pretrained/pong_dqn --greedy --out $(@D)

$(RUNS)/dqn_dataset/manifest.json:
	if [ -f $(@D)/progress.json ]; then $(DISTILL) collect --resume $(@D); \
	else $(DISTILL) collect --config configs/pong/collect_dqn.yaml --out $(@D); fi

CLASS_dqn_kl := {class_path: ForwardKL, init_args: {temperature: 0.01}}
CLASS_dqn_nll := {class_path: NegativeLogLikelihood}
CLASS_dqn_mse := {class_path: QValueMSE}
$(RUNS)/dqn_%/done: | $(RUNS)/dqn_dataset/manifest.json
	$(call fit,$(@D),--config configs/pong/distill_dqn.yaml --data.init_args.path $(RUNS)/dqn_dataset \
		--model.init_args.losses '[$(CLASS_dqn_$*)]')

# As the paper plays, with 5 % of random actions, and without.
define q_values
$(RUNS)/dqn_$(1)/%/evaluation_epsilon/evaluation.json: | $(RUNS)/dqn_$(1)/done
	$(EVALUATE) --episodes 100 --epsilon 0.05 --policy $(RUNS)/dqn_$(1)/policy/$$*/last --out $$(@D)

$(RUNS)/dqn_$(1)/%/evaluation_greedy/evaluation.json: | $(RUNS)/dqn_$(1)/done
	$(EVALUATE) --episodes 32 --greedy --policy $(RUNS)/dqn_$(1)/policy/$$*/last --out $$(@D)
endef
$(foreach l,kl nll mse,$(eval $(call q_values,$(l))))

# ---- one student of three games, and one of each
THREE := runs/three_games
GAMES := pong breakout ms_pacman
three_games: $(foreach g,breakout ms_pacman,$(THREE)/teacher_$(g)/evaluation.json) \
	$(THREE)/teacher_pong/evaluation.json \
	$(foreach l,kl nll,$(foreach g,$(GAMES),\
	$(THREE)/together_$(l)/$(g)/evaluation.json $(THREE)/single_$(g)_$(l)/evaluation.json))

$(THREE)/teacher_%/done:
	$(call fit,$(@D),--config configs/three_games/teacher_$*.yaml)

$(THREE)/teacher_pong/evaluation.json:
	$(EVALUATE) --episodes 100 --policy pretrained/pong --out $(@D)

$(THREE)/teacher_%/evaluation.json: | $(THREE)/teacher_%/done
	$(EVALUATE) --episodes 100 --policy $(@D)/policy/last --out $(@D)

$(foreach g,breakout ms_pacman,$(eval $(THREE)/$(g)/manifest.json: | $(THREE)/teacher_$(g)/done))
$(foreach g,$(GAMES),$(THREE)/$(g)/manifest.json):
	if [ -f $(@D)/progress.json ]; then $(DISTILL) collect --resume $(@D); \
	else $(DISTILL) collect --config configs/three_games/collect_$(notdir $(@D)).yaml; fi

RECORDED := $(foreach g,$(GAMES),$(THREE)/$(g)/manifest.json)
$(THREE)/together_%/done: | $(RECORDED)
	$(call fit,$(@D),--config configs/three_games/distill.yaml \
		--model.init_args.losses '[{class_path: $(CLASS_$*)}]')

define single
$(THREE)/single_$(1)_$(2)/done: | $(THREE)/$(1)/manifest.json
	$$(call fit,$$(@D),--config configs/three_games/single_$(1).yaml \
		--model.init_args.losses '[{class_path: $(CLASS_$(2))}]')

$(THREE)/single_$(1)_$(2)/evaluation.json: | $(THREE)/single_$(1)_$(2)/done
	$(EVALUATE) --episodes 100 --policy $$(@D)/policy/last --out $$(@D)

$(THREE)/together_$(2)/$(1)/evaluation.json: | $(THREE)/together_$(2)/done
	$(EVALUATE) --episodes 100 --policy $(THREE)/together_$(2)/policy/$(1)/last --out $$(@D)
endef
$(foreach l,kl nll,$(foreach g,$(GAMES),$(eval $(call single,$(g),$(l)))))

# ---- the teacher as measure
$(RUNS)/teacher/%/evaluation.json:
	$(EVALUATE) $(if $(filter greedy,$*),--episodes 32 --greedy,--episodes 100) --policy pretrained/pong --out $(@D)

teacher: $(RUNS)/teacher/sampled/evaluation.json $(RUNS)/teacher/greedy/evaluation.json
offline: $(OFFLINE)
acting: $(ACTING)
corrupted: $(RUNS)/corrupted/evaluation.json $(CORRUPTED)
real_time: $(REAL_TIME)
.PHONY: teacher $(OFFLINE) $(ACTING) $(CORRUPTED) $(REAL_TIME)
all: teacher offline acting corrupted real_time dqn three_games
	$(MAKE) -f studies/methods.mk table

# ---- what is kept of it, and what it shows
results:
	$(PYTHON) -m studies.methods agree $(RUNS) $(DATASET) $(RESULTS)
	$(PYTHON) studies/keep.py $(RUNS) $(RESULTS)
	$(PYTHON) studies/keep.py $(THREE) docs/results/three_games

table: results
	$(PYTHON) -m studies.methods pong $(RESULTS)
	$(PYTHON) -m studies.pictures pong $(RESULTS)
	$(PYTHON) -m studies.methods q_values $(RESULTS)
	$(PYTHON) -m studies.methods three_games docs/results/three_games
