# The demo: a real sentence encoder through every verb, one command a rule. Each output is a directory; its report.json
# is the target, since it is there exactly when the directory is complete. Every step is measured against the original.
MODEL := $(BUILD)/minilm
TEXT := $(BUILD)/text/train.txt
DEMO := $(BUILD)/demo
MEASURED := $(foreach step,pruned factorized distilled quantized,$(DEMO)/eval/$(step)/report.json)

demo: $(MEASURED) ## compress a 90.9 MB sentence encoder step by step and measure it
	@$(AIC) compare $(MEASURED) --html $(DEMO)/comparison.html
	@echo "report: $(DEMO)/eval/quantized/report.html and report.md; all steps: $(DEMO)/comparison.html"

$(MODEL)/model.safetensors: scripts/fetch_demo_model.py | $(READY)
	$(BIN)/python scripts/fetch_demo_model.py --out $(MODEL)

$(TEXT): scripts/make_demo_text.py | $(READY)
	$(BIN)/python scripts/make_demo_text.py --out $(dir $@)

$(DEMO)/pruned/report.json: $(MODEL)/model.safetensors configs/demo/prune.yaml
	$(AIC) prune $(MODEL) $(@D) -r configs/demo/prune.yaml --overwrite

$(DEMO)/factorized/report.json: $(DEMO)/pruned/report.json configs/demo/factorize.yaml
	$(AIC) factorize $(<D) $(@D) -r configs/demo/factorize.yaml --overwrite

$(DEMO)/distilled/report.json: $(DEMO)/factorized/report.json configs/demo/distill.yaml $(TEXT)
	$(AIC) distill $(<D) $(@D) --teacher $(MODEL) -r configs/demo/distill.yaml --overwrite

$(DEMO)/quantized/report.json: $(DEMO)/distilled/report.json configs/demo/quantize.yaml
	$(AIC) quantize $(<D) $(@D) -r configs/demo/quantize.yaml --overwrite

# The end of the chain has to be at least four times smaller and to keep the original's ranking of sentence pairs.
$(DEMO)/eval/quantized/report.json: GATES := --fail-if 'size.ratio > 0.25' --fail-if 'quality.embedding_agreement < 0.95'
$(DEMO)/eval/%/report.json: $(DEMO)/%/report.json configs/demo/eval.yaml
	$(AIC) eval $(DEMO)/$* --against $(MODEL) -r configs/demo/eval.yaml -o $(@D) $(GATES)
