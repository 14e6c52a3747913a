SET statement_timeout = 0;
SET lock_timeout = 0;
SET idle_in_transaction_session_timeout = 0;
SET client_encoding = 'UTF8';
SET standard_conforming_strings = on;
SELECT pg_catalog.set_config('search_path', '', false);
SET check_function_bodies = false;
SET xmloption = content;
SET client_min_messages = warning;
SET row_security = off;
SET default_tablespace = '';
SET default_table_access_method = heap;
CREATE TABLE public.alembic_version (
    version_num character varying(32) NOT NULL
);
CREATE TABLE public.artifacts (
    digest character varying(71) NOT NULL,
    kind character varying(16) NOT NULL,
    size_bytes bigint NOT NULL,
    format character varying(32) NOT NULL,
    summary json NOT NULL,
    created_at double precision NOT NULL,
    created_by character varying(64) NOT NULL,
    used_at double precision NOT NULL
);
COMMENT ON COLUMN public.artifacts.digest IS 'sha256:<64 hex> of the bytes as received';
COMMENT ON COLUMN public.artifacts.kind IS 'trace, placement';
COMMENT ON COLUMN public.artifacts.summary IS 'what it holds: layers, experts, tokens, ...';
COMMENT ON COLUMN public.artifacts.used_at IS 'last named by a request; for retention';
CREATE TABLE public.audit (
    number bigint NOT NULL,
    at double precision NOT NULL,
    who character varying(64) NOT NULL,
    action character varying(64) NOT NULL,
    target character varying(255) NOT NULL,
    request_id character varying(64),
    detail json
);
CREATE SEQUENCE public.audit_number_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.audit_number_seq OWNED BY public.audit.number;
CREATE TABLE public.counters (
    name character varying(64) NOT NULL,
    labels character varying(255) NOT NULL,
    value double precision NOT NULL
);
COMMENT ON COLUMN public.counters.labels IS 'a=b,c=d in order of name';
CREATE TABLE public.deployment_versions (
    deployment character varying(64) NOT NULL,
    version integer NOT NULL,
    placement_digest character varying(71) NOT NULL,
    job_id character varying(40),
    cause character varying(16) NOT NULL,
    by character varying(64) NOT NULL,
    why text NOT NULL,
    of_version integer,
    predicted json,
    observed json,
    promoted_at double precision NOT NULL
);
COMMENT ON COLUMN public.deployment_versions.version IS '1, 2, ... without gaps';
COMMENT ON COLUMN public.deployment_versions.job_id IS 'solve that found it';
COMMENT ON COLUMN public.deployment_versions.cause IS 'manual, automatic, rollback';
COMMENT ON COLUMN public.deployment_versions.of_version IS 'for a rollback: the version it returns to';
COMMENT ON COLUMN public.deployment_versions.predicted IS 'objective, balance and gain when it was promoted';
COMMENT ON COLUMN public.deployment_versions.observed IS 'the same, on the windows since';
CREATE TABLE public.deployments (
    name character varying(64) NOT NULL,
    spec json NOT NULL,
    revision bigint NOT NULL,
    version integer,
    drift json,
    refresh json,
    created_at double precision NOT NULL,
    updated_at double precision NOT NULL
);
COMMENT ON COLUMN public.deployments.spec IS 'topology, model, options, policy as given';
COMMENT ON COLUMN public.deployments.revision IS 'counts every change of spec and placement';
COMMENT ON COLUMN public.deployments.version IS 'current version of the placement; none before the first';
COMMENT ON COLUMN public.deployments.drift IS 'what recent windows say';
COMMENT ON COLUMN public.deployments.refresh IS 'state of the automatic refresh';
CREATE TABLE public.events (
    job_id character varying(40) NOT NULL,
    seq integer NOT NULL,
    kind character varying(16) NOT NULL,
    data json NOT NULL,
    at double precision NOT NULL
);
COMMENT ON COLUMN public.events.seq IS '1, 2, ... without gaps';
COMMENT ON COLUMN public.events.kind IS 'progress, incumbent, done';
CREATE TABLE public.jobs (
    number bigint NOT NULL,
    id character varying(40) NOT NULL,
    kind character varying(16) NOT NULL,
    status character varying(16) NOT NULL,
    priority integer NOT NULL,
    caller character varying(64) NOT NULL,
    deployment character varying(64),
    spec json NOT NULL,
    cpus integer NOT NULL,
    trace_digest character varying(71),
    start_digest character varying(71),
    idempotency_key character varying(255),
    request_hash character varying(64) NOT NULL,
    created_at double precision NOT NULL,
    started_at double precision,
    ended_at double precision,
    attempt integer NOT NULL,
    lost integer NOT NULL,
    worker character varying(64),
    beat bigint NOT NULL,
    stop_requested boolean NOT NULL,
    event_seq integer NOT NULL,
    incumbent json,
    incumbent_digest character varying(71),
    result json,
    placement_digest character varying(71),
    error json
);
COMMENT ON COLUMN public.jobs.number IS 'order of arrival';
COMMENT ON COLUMN public.jobs.kind IS 'solve, evaluation, check';
COMMENT ON COLUMN public.jobs.caller IS 'id of the token, or ''local''';
COMMENT ON COLUMN public.jobs.deployment IS 'deployment whose refresh this is';
COMMENT ON COLUMN public.jobs.cpus IS 'threads that it may use';
COMMENT ON COLUMN public.jobs.start_digest IS 'placement to start from or score';
COMMENT ON COLUMN public.jobs.attempt IS 'times claimed; fences late writers';
COMMENT ON COLUMN public.jobs.lost IS 'times that its worker was lost';
COMMENT ON COLUMN public.jobs.worker IS 'who holds the lease';
COMMENT ON COLUMN public.jobs.beat IS 'counts up while the worker lives';
COMMENT ON COLUMN public.jobs.event_seq IS 'number of its last event';
COMMENT ON COLUMN public.jobs.incumbent IS 'objective, lower_bound, gap, solver, elapsed_s';
COMMENT ON COLUMN public.jobs.error IS 'code and message';
CREATE SEQUENCE public.jobs_number_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.jobs_number_seq OWNED BY public.jobs.number;
CREATE TABLE public.load_windows (
    number bigint NOT NULL,
    deployment character varying(64) NOT NULL,
    "window" bigint NOT NULL,
    rank integer NOT NULL,
    version integer,
    tokens double precision NOT NULL,
    load bytea NOT NULL,
    received_at double precision NOT NULL
);
COMMENT ON COLUMN public.load_windows."window" IS 'the caller''s number of the window (step)';
COMMENT ON COLUMN public.load_windows.version IS 'placement that was running';
COMMENT ON COLUMN public.load_windows.load IS 'zlib of int64 [layers, experts]';
CREATE SEQUENCE public.load_windows_number_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.load_windows_number_seq OWNED BY public.load_windows.number;
CREATE TABLE public.tokens (
    id character varying(32) NOT NULL,
    name character varying(64) NOT NULL,
    hash character varying(64) NOT NULL,
    scopes json NOT NULL,
    limits json NOT NULL,
    created_at double precision NOT NULL,
    expires_at double precision,
    revoked_at double precision,
    previous_hash character varying(64),
    previous_until double precision
);
COMMENT ON COLUMN public.tokens.hash IS 'SHA-256 of 256 random bits';
COMMENT ON COLUMN public.tokens.previous_hash IS 'of the secret before the last rotation';
COMMENT ON COLUMN public.tokens.previous_until IS 'how long that one is still taken';
CREATE TABLE public.workers (
    id character varying(64) NOT NULL,
    host character varying(255) NOT NULL,
    boot_id character varying(64) NOT NULL,
    pid integer NOT NULL,
    pid_started double precision NOT NULL,
    cpus integer NOT NULL,
    started_at double precision NOT NULL,
    beat bigint NOT NULL,
    seen_at double precision NOT NULL
);
COMMENT ON COLUMN public.workers.boot_id IS 'so that a dead process is known at once';
COMMENT ON COLUMN public.workers.pid_started IS 'start of the process: pids come again';
ALTER TABLE ONLY public.audit ALTER COLUMN number SET DEFAULT nextval('public.audit_number_seq'::regclass);
ALTER TABLE ONLY public.jobs ALTER COLUMN number SET DEFAULT nextval('public.jobs_number_seq'::regclass);
ALTER TABLE ONLY public.load_windows ALTER COLUMN number SET DEFAULT nextval('public.load_windows_number_seq'::regclass);
INSERT INTO public.alembic_version VALUES ('0001');
INSERT INTO public.artifacts VALUES ('sha256:1111111111111111111111111111111111111111111111111111111111111111', 'trace', 3000000000, 'npz', '{"layers":6}', 999.25, 'local', 999.25);
INSERT INTO public.artifacts VALUES ('sha256:2222222222222222222222222222222222222222222222222222222222222222', 'placement', 3000000000, 'moe-placement/1', '{"layers":6}', 999.25, 'local', 999.25);
INSERT INTO public.audit VALUES (1, 1000, 'local', 'token.create', 't1', NULL, '{"a":1}');
INSERT INTO public.counters VALUES ('solves', 'status=succeeded', 1.5);
INSERT INTO public.deployment_versions VALUES ('prod', 1, 'sha256:2222222222222222222222222222222222222222222222222222222222222222', 's-00000000000000000000000003', 'manual', 'local', 'it''s "better"
by far', NULL, '{"gain":0.1}', NULL, 1003);
INSERT INTO public.deployments VALUES ('prod', '{"topology":"h100:2x8"}', 4, 1, '{"tv":0.25}', '{"state":"idle"}', 1000, 1003);
INSERT INTO public.events VALUES ('s-00000000000000000000000002', 1, 'progress', '{"phase":"started"}', 1001.5);
INSERT INTO public.events VALUES ('s-00000000000000000000000002', 2, 'incumbent', '{"objective":0.00123,"lower_bound":0.00117,"gap":0.049,"solver":"search","elapsed_s":1.5}', 1002);
INSERT INTO public.events VALUES ('s-00000000000000000000000003', 1, 'done', '{"status":"succeeded","result":{"objective":{"name":"step-time","value":0.00123,"unit":"s"},"placement_id":"sha256:2222222222222222222222222222222222222222222222222222222222222222"},"error":null}', 1002.5);
INSERT INTO public.jobs VALUES (1, 's-00000000000000000000000001', 'solve', 'queued', 0, 'local', NULL, '{"topology":"h100:2x8","options":{"seed":7}}', 1, 'sha256:1111111111111111111111111111111111111111111111111111111111111111', NULL, 'key', '0000000000000000000000000000000000000000000000000000000000000000', 1000.5, NULL, NULL, 0, 0, NULL, 0, false, 0, NULL, NULL, NULL, NULL, NULL);
INSERT INTO public.jobs VALUES (2, 's-00000000000000000000000002', 'solve', 'running', 0, 'local', NULL, '{"topology":"h100:2x8","options":{"seed":7}}', 1, 'sha256:1111111111111111111111111111111111111111111111111111111111111111', 'sha256:2222222222222222222222222222222222222222222222222222222222222222', NULL, '0000000000000000000000000000000000000000000000000000000000000000', 1000.5, 1001.5, NULL, 2, 1, 'w-1', 17, true, 2, '{"objective":0.00123,"lower_bound":0.00117,"gap":0.049,"solver":"search","elapsed_s":1.5}', 'sha256:2222222222222222222222222222222222222222222222222222222222222222', NULL, NULL, NULL);
INSERT INTO public.jobs VALUES (3, 's-00000000000000000000000003', 'solve', 'succeeded', 0, 'local', 'prod', '{"topology":"h100:2x8","options":{"seed":7}}', 1, 'sha256:1111111111111111111111111111111111111111111111111111111111111111', NULL, NULL, '0000000000000000000000000000000000000000000000000000000000000000', 1000.5, 1001.5, 1002.5, 1, 0, NULL, 0, false, 1, '{"objective":0.00123,"lower_bound":0.00117,"gap":0.049,"solver":"search","elapsed_s":1.5}', 'sha256:2222222222222222222222222222222222222222222222222222222222222222', '{"objective":{"name":"step-time","value":0.00123,"unit":"s"},"placement_id":"sha256:2222222222222222222222222222222222222222222222222222222222222222"}', 'sha256:2222222222222222222222222222222222222222222222222222222222222222', NULL);
INSERT INTO public.jobs VALUES (4, 'e-00000000000000000000000004', 'evaluation', 'failed', -5, 't1', NULL, '{"topology":"h100:2x8","options":{"seed":7}}', 1, 'sha256:1111111111111111111111111111111111111111111111111111111111111111', NULL, NULL, '0000000000000000000000000000000000000000000000000000000000000000', 1000.5, NULL, NULL, 0, 0, NULL, 0, false, 0, NULL, NULL, NULL, NULL, '{"code":"invalid","message":"größer"}');
INSERT INTO public.load_windows VALUES (1, 'prod', 5000000000, 0, 1, 4096, '\x789c630001ff2722', 1004);
INSERT INTO public.tokens VALUES ('t1', 'ann', 'ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff', '["read"]', '{}', 1000, NULL, NULL, NULL, NULL);
INSERT INTO public.workers VALUES ('w-1', 'a', 'b', 12, 5, 2, 1000, 3, 1001);
SELECT pg_catalog.setval('public.audit_number_seq', 1, true);
SELECT pg_catalog.setval('public.jobs_number_seq', 4, true);
SELECT pg_catalog.setval('public.load_windows_number_seq', 1, true);
ALTER TABLE ONLY public.alembic_version
    ADD CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num);
ALTER TABLE ONLY public.artifacts
    ADD CONSTRAINT pk_artifacts PRIMARY KEY (digest);
ALTER TABLE ONLY public.audit
    ADD CONSTRAINT pk_audit PRIMARY KEY (number);
ALTER TABLE ONLY public.counters
    ADD CONSTRAINT pk_counters PRIMARY KEY (name, labels);
ALTER TABLE ONLY public.deployment_versions
    ADD CONSTRAINT pk_deployment_versions PRIMARY KEY (deployment, version);
ALTER TABLE ONLY public.deployments
    ADD CONSTRAINT pk_deployments PRIMARY KEY (name);
ALTER TABLE ONLY public.events
    ADD CONSTRAINT pk_events PRIMARY KEY (job_id, seq);
ALTER TABLE ONLY public.jobs
    ADD CONSTRAINT pk_jobs PRIMARY KEY (number);
ALTER TABLE ONLY public.load_windows
    ADD CONSTRAINT pk_load_windows PRIMARY KEY (number);
ALTER TABLE ONLY public.tokens
    ADD CONSTRAINT pk_tokens PRIMARY KEY (id);
ALTER TABLE ONLY public.workers
    ADD CONSTRAINT pk_workers PRIMARY KEY (id);
ALTER TABLE ONLY public.jobs
    ADD CONSTRAINT uq_jobs_id UNIQUE (id);
ALTER TABLE ONLY public.jobs
    ADD CONSTRAINT uq_jobs_idempotency UNIQUE (caller, kind, idempotency_key);
ALTER TABLE ONLY public.load_windows
    ADD CONSTRAINT uq_load_windows_part UNIQUE (deployment, "window", rank);
ALTER TABLE ONLY public.tokens
    ADD CONSTRAINT uq_tokens_hash UNIQUE (hash);
CREATE INDEX ix_jobs_deployment ON public.jobs USING btree (deployment, number);
CREATE INDEX ix_jobs_queue ON public.jobs USING btree (status, priority, caller, number, cpus, kind);
CREATE INDEX ix_jobs_status ON public.jobs USING btree (status, number);
ALTER TABLE ONLY public.deployment_versions
    ADD CONSTRAINT fk_deployment_versions_deployment_deployments FOREIGN KEY (deployment) REFERENCES public.deployments(name) ON DELETE CASCADE;
ALTER TABLE ONLY public.deployment_versions
    ADD CONSTRAINT fk_deployment_versions_placement_digest_artifacts FOREIGN KEY (placement_digest) REFERENCES public.artifacts(digest);
ALTER TABLE ONLY public.events
    ADD CONSTRAINT fk_events_job_id_jobs FOREIGN KEY (job_id) REFERENCES public.jobs(id) ON DELETE CASCADE;
ALTER TABLE ONLY public.jobs
    ADD CONSTRAINT fk_jobs_incumbent_digest_artifacts FOREIGN KEY (incumbent_digest) REFERENCES public.artifacts(digest);
ALTER TABLE ONLY public.jobs
    ADD CONSTRAINT fk_jobs_placement_digest_artifacts FOREIGN KEY (placement_digest) REFERENCES public.artifacts(digest);
ALTER TABLE ONLY public.jobs
    ADD CONSTRAINT fk_jobs_start_digest_artifacts FOREIGN KEY (start_digest) REFERENCES public.artifacts(digest);
ALTER TABLE ONLY public.jobs
    ADD CONSTRAINT fk_jobs_trace_digest_artifacts FOREIGN KEY (trace_digest) REFERENCES public.artifacts(digest);
ALTER TABLE ONLY public.load_windows
    ADD CONSTRAINT fk_load_windows_deployment_deployments FOREIGN KEY (deployment) REFERENCES public.deployments(name) ON DELETE CASCADE;
