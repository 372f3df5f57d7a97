"""Questions asked to models, scores of the answers, and calibration without labels."""
