"""The paper's results (arXiv 2312.14591v4), shown below ours: LLaMA-2 13B with judgments by GPT-4."""

SOURCE = "arXiv 2312.14591v4"
_METHODS = ("base", "Forward Prediction", "Hindsight", "ILF-MLE", "ILF-DPO", "CUT")

# Table 2: AlpacaEval win rate.
ALPACA_COLD_START = dict(zip(_METHODS, (1.87, 7.11, 10.22, 4.01, 3.11, 61.06), strict=True))
ALPACA_WARM_START = dict(zip(_METHODS, (81.09, 33.21, 36.67, 79.31, 83.22, 90.73), strict=True))
# Table 3: summarization.
ROUGE_LSUM = dict(zip(_METHODS, (10.87, 38.51, 35.29, 25.44, 10.77, 39.89), strict=True))
# Table 4: TruthfulQA, ablations.
TRUTHFULQA = {
    "CUT": 52.58,
    "CUT without L1": 39.01,
    "CUT without the unsatisfactory part of L2": 47.24,
    "CUT without dynamic weighting": 48.84,
}
# Table 6: AlpacaEval win rate after the online iterations 1 to 5.
ALPACA_ONLINE = (89.75, 90.23, 91.04, 91.68, 90.68)
