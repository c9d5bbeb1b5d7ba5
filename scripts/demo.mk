# The demo: a real sentence encoder made eight times smaller in two ways, one command a rule. The direct way quantizes it;
# the chain first removes what the rest can take over. Each output is a directory; its report.json is the target, since
# it is there exactly when the directory is complete. `eval` measures the two ends against the original.
MODEL := $(BUILD)/minilm
WEIGHTS := $(MODEL)/model.safetensors
TEXT := $(BUILD)/text
TEXTS := $(TEXT)/train.txt $(TEXT)/tuning.txt $(TEXT)/heldout.txt
DEMO := $(BUILD)/demo
MEASURED := $(DEMO)/eval/direct/report.json $(DEMO)/eval/quantized/report.json

# The chain's first step needs no text and is asked for first: something is finished while a reader still looks.
demo: $(DEMO)/factorized/report.json $(MEASURED) ## compress a 90.9 MB sentence encoder directly and step by step, and measure both
	@$(AIC) compare $(MEASURED) --html $(DEMO)/comparison.html
	@echo "report: $(DEMO)/eval/quantized/report.html and report.md; both ways: $(DEMO)/comparison.html"

$(WEIGHTS): scripts/fetch_demo_model.py | $(READY)
	$(BIN)/python scripts/fetch_demo_model.py --out $(MODEL)

# One run writes all three.
$(TEXTS) &: scripts/make_demo_text.py | $(READY)
	$(BIN)/python scripts/make_demo_text.py --out $(TEXT)

$(DEMO)/direct/report.json: $(WEIGHTS) configs/demo/quantize.yaml $(TEXT)/train.txt
	$(AIC) quantize $(<D) $(@D) -r configs/demo/quantize.yaml --overwrite --latency off

$(DEMO)/factorized/report.json: $(WEIGHTS) configs/demo/factorize.yaml
	$(AIC) factorize $(<D) $(@D) -r configs/demo/factorize.yaml --overwrite --latency off

$(DEMO)/pruned/report.json: $(DEMO)/factorized/report.json configs/demo/prune.yaml $(TEXT)/train.txt
	$(AIC) prune $(<D) $(@D) -r configs/demo/prune.yaml --overwrite --latency off

$(DEMO)/quantized/report.json: $(DEMO)/pruned/report.json configs/demo/quantize.yaml $(TEXT)/train.txt
	$(AIC) quantize $(<D) $(@D) -r configs/demo/quantize.yaml --overwrite --latency off

# What the demo promises: the chain is smaller still, keeps the original's ranking of sentence pairs, and takes half its time:
# a figure of a busy machine, so that the gate is on the lower end of its interval.
$(DEMO)/eval/direct/report.json: GATES := --fail-if 'size.ratio > 0.13' --fail-if 'quality.embedding_agreement < 0.975'
$(DEMO)/eval/quantized/report.json: GATES := --fail-if 'size.ratio > 0.125' --fail-if 'quality.embedding_agreement < 0.97' \
	--fail-if 'latency.low > 0.5'
$(DEMO)/eval/%/report.json: $(DEMO)/%/report.json configs/demo/eval.yaml $(WEIGHTS) $(TEXT)/heldout.txt
	$(AIC) eval $(<D) --against $(MODEL) -r configs/demo/eval.yaml -o $(@D) $(GATES)
