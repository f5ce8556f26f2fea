"""What a run tells: metrics, rollouts, progress, logs, reports."""
