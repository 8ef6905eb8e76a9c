"""Jobs on Cloud TPUs: what a job is, the gcloud commands, the control of a job."""
