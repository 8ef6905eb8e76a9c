"""Jobs on Cloud TPUs: `job` describes one, `gcloud` runs commands, `control` manages the job."""
