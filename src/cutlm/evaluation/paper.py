"""The paper's results (arXiv 2312.14591v4), shown below ours: LLaMA-2 13B with judgments by GPT-4."""

SOURCE = "arXiv 2312.14591v4"

# Table 2: AlpacaEval win rate.
ALPACA_COLD_START = {
    "base": 1.87,
    "Forward Prediction": 7.11,
    "Hindsight": 10.22,
    "ILF-MLE": 4.01,
    "ILF-DPO": 3.11,
    "CUT": 61.06,
}
ALPACA_WARM_START = {
    "base": 81.09,
    "Forward Prediction": 33.21,
    "Hindsight": 36.67,
    "ILF-MLE": 79.31,
    "ILF-DPO": 83.22,
    "CUT": 90.73,
}
# Table 3: summarization.
ROUGE_LSUM = {
    "base": 10.87,
    "Forward Prediction": 38.51,
    "Hindsight": 35.29,
    "ILF-MLE": 25.44,
    "ILF-DPO": 10.77,
    "CUT": 39.89,
}
# Table 4: TruthfulQA, ablations.
TRUTHFULQA = {
    "CUT": 52.58,
    "CUT without L1": 39.01,
    "CUT without the unsatisfactory part of L2": 47.24,
    "CUT without dynamic weighting": 48.84,
}
# Table 6: AlpacaEval win rate after the online iterations 1 to 5.
ALPACA_ONLINE = (89.75, 90.23, 91.04, 91.68, 90.68)
