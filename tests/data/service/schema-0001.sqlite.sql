BEGIN TRANSACTION;
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "alembic_version" VALUES('0001');
CREATE TABLE artifacts (
	digest VARCHAR(71) NOT NULL, 
	kind VARCHAR(16) NOT NULL, 
	size_bytes BIGINT NOT NULL, 
	format VARCHAR(32) NOT NULL, 
	summary JSON NOT NULL, 
	created_at DOUBLE NOT NULL, 
	created_by VARCHAR(64) NOT NULL, 
	used_at DOUBLE NOT NULL, 
	CONSTRAINT pk_artifacts PRIMARY KEY (digest)
);
INSERT INTO "artifacts" VALUES('sha256:1111111111111111111111111111111111111111111111111111111111111111','trace',3000000000,'npz','{"layers":6}',999.25,'local',999.25);
INSERT INTO "artifacts" VALUES('sha256:2222222222222222222222222222222222222222222222222222222222222222','placement',3000000000,'moe-placement/1','{"layers":6}',999.25,'local',999.25);
CREATE TABLE audit (
	number INTEGER NOT NULL, 
	at DOUBLE NOT NULL, 
	who VARCHAR(64) NOT NULL, 
	action VARCHAR(64) NOT NULL, 
	target VARCHAR(255) NOT NULL, 
	request_id VARCHAR(64), 
	detail JSON, 
	CONSTRAINT pk_audit PRIMARY KEY (number)
);
INSERT INTO "audit" VALUES(1,1000.0,'local','token.create','t1',NULL,'{"a":1}');
CREATE TABLE counters (
	name VARCHAR(64) NOT NULL, 
	labels VARCHAR(255) NOT NULL, 
	value DOUBLE NOT NULL, 
	CONSTRAINT pk_counters PRIMARY KEY (name, labels)
);
INSERT INTO "counters" VALUES('solves','status=succeeded',1.5);
CREATE TABLE deployment_versions (
	deployment VARCHAR(64) NOT NULL, 
	version INTEGER NOT NULL, 
	placement_digest VARCHAR(71) NOT NULL, 
	job_id VARCHAR(40), 
	cause VARCHAR(16) NOT NULL, 
	"by" VARCHAR(64) NOT NULL, 
	why TEXT NOT NULL, 
	of_version INTEGER, 
	predicted JSON, 
	observed JSON, 
	promoted_at DOUBLE NOT NULL, 
	CONSTRAINT pk_deployment_versions PRIMARY KEY (deployment, version), 
	CONSTRAINT fk_deployment_versions_deployment_deployments FOREIGN KEY(deployment) REFERENCES deployments (name) ON DELETE CASCADE, 
	CONSTRAINT fk_deployment_versions_placement_digest_artifacts FOREIGN KEY(placement_digest) REFERENCES artifacts (digest)
);
INSERT INTO "deployment_versions" VALUES('prod',1,'sha256:2222222222222222222222222222222222222222222222222222222222222222','s-00000000000000000000000003','manual','local','it''s "better"
by far',NULL,'{"gain":0.1}',NULL,1003.0);
CREATE TABLE deployments (
	name VARCHAR(64) NOT NULL, 
	spec JSON NOT NULL, 
	revision BIGINT NOT NULL, 
	version INTEGER, 
	drift JSON, 
	refresh JSON, 
	created_at DOUBLE NOT NULL, 
	updated_at DOUBLE NOT NULL, 
	CONSTRAINT pk_deployments PRIMARY KEY (name)
);
INSERT INTO "deployments" VALUES('prod','{"topology":"h100:2x8"}',4,1,'{"tv":0.25}','{"state":"idle"}',1000.0,1003.0);
CREATE TABLE events (
	job_id VARCHAR(40) NOT NULL, 
	seq INTEGER NOT NULL, 
	kind VARCHAR(16) NOT NULL, 
	data JSON NOT NULL, 
	at DOUBLE NOT NULL, 
	CONSTRAINT pk_events PRIMARY KEY (job_id, seq), 
	CONSTRAINT fk_events_job_id_jobs FOREIGN KEY(job_id) REFERENCES jobs (id) ON DELETE CASCADE
);
INSERT INTO "events" VALUES('s-00000000000000000000000002',1,'progress','{"phase":"started"}',1001.5);
INSERT INTO "events" VALUES('s-00000000000000000000000002',2,'incumbent','{"objective":0.00123,"lower_bound":0.00117,"gap":0.049,"solver":"search","elapsed_s":1.5}',1002.0);
INSERT INTO "events" VALUES('s-00000000000000000000000003',1,'done','{"status":"succeeded","result":{"objective":{"name":"step-time","value":0.00123,"unit":"s"},"placement_id":"sha256:2222222222222222222222222222222222222222222222222222222222222222"},"error":null}',1002.5);
CREATE TABLE jobs (
	number INTEGER NOT NULL, 
	id VARCHAR(40) NOT NULL, 
	kind VARCHAR(16) NOT NULL, 
	status VARCHAR(16) NOT NULL, 
	priority INTEGER NOT NULL, 
	caller VARCHAR(64) NOT NULL, 
	deployment VARCHAR(64), 
	spec JSON NOT NULL, 
	cpus INTEGER NOT NULL, 
	trace_digest VARCHAR(71), 
	start_digest VARCHAR(71), 
	idempotency_key VARCHAR(255), 
	request_hash VARCHAR(64) NOT NULL, 
	created_at DOUBLE NOT NULL, 
	started_at DOUBLE, 
	ended_at DOUBLE, 
	attempt INTEGER NOT NULL, 
	lost INTEGER NOT NULL, 
	worker VARCHAR(64), 
	beat BIGINT NOT NULL, 
	stop_requested BOOLEAN NOT NULL, 
	event_seq INTEGER NOT NULL, 
	incumbent JSON, 
	incumbent_digest VARCHAR(71), 
	result JSON, 
	placement_digest VARCHAR(71), 
	error JSON, 
	CONSTRAINT pk_jobs PRIMARY KEY (number), 
	CONSTRAINT fk_jobs_incumbent_digest_artifacts FOREIGN KEY(incumbent_digest) REFERENCES artifacts (digest), 
	CONSTRAINT fk_jobs_placement_digest_artifacts FOREIGN KEY(placement_digest) REFERENCES artifacts (digest), 
	CONSTRAINT fk_jobs_start_digest_artifacts FOREIGN KEY(start_digest) REFERENCES artifacts (digest), 
	CONSTRAINT fk_jobs_trace_digest_artifacts FOREIGN KEY(trace_digest) REFERENCES artifacts (digest), 
	CONSTRAINT uq_jobs_idempotency UNIQUE (caller, kind, idempotency_key), 
	CONSTRAINT uq_jobs_id UNIQUE (id)
);
INSERT INTO "jobs" VALUES(1,'s-00000000000000000000000001','solve','queued',0,'local',NULL,'{"topology":"h100:2x8","options":{"seed":7}}',1,'sha256:1111111111111111111111111111111111111111111111111111111111111111',NULL,'key','0000000000000000000000000000000000000000000000000000000000000000',1000.5,NULL,NULL,0,0,NULL,0,0,0,NULL,NULL,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES(2,'s-00000000000000000000000002','solve','running',0,'local',NULL,'{"topology":"h100:2x8","options":{"seed":7}}',1,'sha256:1111111111111111111111111111111111111111111111111111111111111111','sha256:2222222222222222222222222222222222222222222222222222222222222222',NULL,'0000000000000000000000000000000000000000000000000000000000000000',1000.5,1001.5,NULL,2,1,'w-1',17,1,2,'{"objective":0.00123,"lower_bound":0.00117,"gap":0.049,"solver":"search","elapsed_s":1.5}','sha256:2222222222222222222222222222222222222222222222222222222222222222',NULL,NULL,NULL);
INSERT INTO "jobs" VALUES(3,'s-00000000000000000000000003','solve','succeeded',0,'local','prod','{"topology":"h100:2x8","options":{"seed":7}}',1,'sha256:1111111111111111111111111111111111111111111111111111111111111111',NULL,NULL,'0000000000000000000000000000000000000000000000000000000000000000',1000.5,1001.5,1002.5,1,0,NULL,0,0,1,'{"objective":0.00123,"lower_bound":0.00117,"gap":0.049,"solver":"search","elapsed_s":1.5}','sha256:2222222222222222222222222222222222222222222222222222222222222222','{"objective":{"name":"step-time","value":0.00123,"unit":"s"},"placement_id":"sha256:2222222222222222222222222222222222222222222222222222222222222222"}','sha256:2222222222222222222222222222222222222222222222222222222222222222',NULL);
INSERT INTO "jobs" VALUES(4,'e-00000000000000000000000004','evaluation','failed',-5,'t1',NULL,'{"topology":"h100:2x8","options":{"seed":7}}',1,'sha256:1111111111111111111111111111111111111111111111111111111111111111',NULL,NULL,'0000000000000000000000000000000000000000000000000000000000000000',1000.5,NULL,NULL,0,0,NULL,0,0,0,NULL,NULL,NULL,NULL,'{"code":"invalid","message":"größer"}');
CREATE TABLE load_windows (
	number INTEGER NOT NULL, 
	deployment VARCHAR(64) NOT NULL, 
	window BIGINT NOT NULL, 
	rank INTEGER NOT NULL, 
	version INTEGER, 
	tokens DOUBLE NOT NULL, 
	load BLOB NOT NULL, 
	received_at DOUBLE NOT NULL, 
	CONSTRAINT pk_load_windows PRIMARY KEY (number), 
	CONSTRAINT fk_load_windows_deployment_deployments FOREIGN KEY(deployment) REFERENCES deployments (name) ON DELETE CASCADE, 
	CONSTRAINT uq_load_windows_part UNIQUE (deployment, window, rank)
);
INSERT INTO "load_windows" VALUES(1,'prod',5000000000,0,1,4096.0,X'789C630001FF2722',1004.0);
CREATE TABLE tokens (
	id VARCHAR(32) NOT NULL, 
	name VARCHAR(64) NOT NULL, 
	hash VARCHAR(64) NOT NULL, 
	scopes JSON NOT NULL, 
	limits JSON NOT NULL, 
	created_at DOUBLE NOT NULL, 
	expires_at DOUBLE, 
	revoked_at DOUBLE, 
	previous_hash VARCHAR(64), 
	previous_until DOUBLE, 
	CONSTRAINT pk_tokens PRIMARY KEY (id), 
	CONSTRAINT uq_tokens_hash UNIQUE (hash)
);
INSERT INTO "tokens" VALUES('t1','ann','ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff','["read"]','{}',1000.0,NULL,NULL,NULL,NULL);
CREATE TABLE workers (
	id VARCHAR(64) NOT NULL, 
	host VARCHAR(255) NOT NULL, 
	boot_id VARCHAR(64) NOT NULL, 
	pid INTEGER NOT NULL, 
	pid_started DOUBLE NOT NULL, 
	cpus INTEGER NOT NULL, 
	started_at DOUBLE NOT NULL, 
	beat BIGINT NOT NULL, 
	seen_at DOUBLE NOT NULL, 
	CONSTRAINT pk_workers PRIMARY KEY (id)
);
INSERT INTO "workers" VALUES('w-1','a','b',12,5.0,2,1000.0,3,1001.0);
CREATE INDEX ix_jobs_deployment ON jobs (deployment, number);
CREATE INDEX ix_jobs_queue ON jobs (status, priority, caller, number, cpus, kind);
CREATE INDEX ix_jobs_status ON jobs (status, number);
COMMIT;
