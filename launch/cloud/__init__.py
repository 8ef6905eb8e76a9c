"""Jobs on Cloud TPUs: the job, the gcloud commands, the control of a job."""
