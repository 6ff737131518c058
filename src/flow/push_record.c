/*-------------------------------------------------------------------------
 *
 * push_record.c
 *	  Write down what came of pushes.
 *
 * A record is fenced by the number of the claim: what comes after the claim was given up
 * changes nothing.  What was delivered, which most are, has a statement of its own: the other has much
 * more to decide about each row.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "utils/builtins.h"
#include "utils/timestamp.h"

#include "base/spi_call.h"
#include "base/table_insert.h"
#include "flow/push.h"

#define MAX_FREE_RETRIES 20
#define CHANGED_MS 100			/* a platform is being changed: ask again */

/*
 * Delivered.  $1 number, $2 claim, $3 version, $4 status, $5 now.  Whether more is wanted
 * is asked of the row as it is when it is changed: a new version may have come since the
 * statement began.  What was given up or blocked meanwhile, and wants more, stays so: the
 * task may be a test now.  Returns those that were still ours.
 */
static RedriveSql record_delivered = {
	.lookups = true,
	.text =
	"UPDATE redrive.pushes AS u SET"
	"  state = CASE WHEN u.wanted_version <= n.version THEN 'delivered'::redrive.push_state WHEN u.state IN ('dead', 'blocked') THEN u.state ELSE 'pending' END,"
	"  retry_count = CASE WHEN u.wanted_version > n.version THEN 0 ELSE u.retry_count END,"
	"  next_attempt_at = CASE WHEN u.wanted_version > n.version THEN $5 ELSE u.next_attempt_at END,"
	"  pushed_version = n.version, pushed_status = CASE WHEN u.wanted_version = n.version THEN u.wanted_status END,"
	"  delivered_at = $5, http_status = n.http_status, attempt_no = u.attempt_no + 1, last_claim_id = n.claim_id,"
	"  error_class = CASE WHEN u.wanted_version > n.version AND u.state IN ('dead', 'blocked') THEN u.error_class END,"
	"  message = CASE WHEN u.wanted_version > n.version AND u.state IN ('dead', 'blocked') THEN u.message END"
	" FROM unnest($1, $2, $3, $4) WITH ORDINALITY AS n (push_id, claim_id, version, http_status, place)"
	" WHERE u.push_id = n.push_id AND u.last_claim_id < n.claim_id"
	" RETURNING n.place, u.attempt_no, false AS charged",
	.nargs = 5,.argtypes = {INT8ARRAYOID, INT8ARRAYOID, INT8ARRAYOID, INT4ARRAYOID, TIMESTAMPTZOID}
};

/*
 * Not delivered.  $1 number, $2 claim, $3 version, $4 platform, $5 charged, $6 permanent,
 * $7 blocked, $8 given back, $9 probe, $10 least wait in ms, $11 class, $12 status,
 * $13 message, $14 end; $15 now, $16 the attempts that may be free.  What was given up or
 * blocked meanwhile stays so; what is given back and need not wait keeps its place.
 * Returns those that were still ours.
 */
#define NEXT_STATE \
	"CASE WHEN u.state IN ('dead', 'blocked') THEN u.state::text" \
	" WHEN r.given_back OR u.wanted_version > r.version THEN 'pending'" \
	" WHEN r.blocked THEN 'blocked' WHEN r.permanent THEN 'dead'" \
	" WHEN r.charged AND u.retry_count >= p.max_retries THEN 'dead'" \
	" WHEN NOT r.charged AND NOT r.is_probe AND r.error_class <> 'ours' AND u.free_count >= $16 THEN 'dead'" \
	" ELSE 'waiting' END"

static RedriveSql record_failed = {
	.lookups = true,
	.text =
	"UPDATE redrive.pushes AS u SET"
	"  state = (" NEXT_STATE ")::redrive.push_state,"
	"  retry_count = CASE " NEXT_STATE " WHEN 'waiting' THEN u.retry_count + r.charged::int"
	"   WHEN 'pending' THEN CASE WHEN u.wanted_version > r.version THEN 0 ELSE u.retry_count END ELSE u.retry_count END,"
	"  free_count = CASE WHEN " NEXT_STATE " = 'waiting' AND NOT r.charged AND NOT r.is_probe THEN u.free_count + 1 ELSE u.free_count END,"
	"  next_attempt_at = CASE " NEXT_STATE " WHEN 'waiting' THEN $15 + greatest(r.wait_ms * interval '1 ms',"
	"   CASE WHEN r.charged THEN redrive._retry_delay(p.retry_interval, p.retry_factor, p.retry_delay_max, u.retry_count, u.push_id)"
	"   ELSE interval '1 s' * least(u.free_count + 1, 60) END)"
	"   WHEN 'pending' THEN CASE WHEN NOT r.given_back THEN $15 WHEN r.wait_ms > 0 THEN $15 + r.wait_ms * interval '1 ms' ELSE u.next_attempt_at END"
	"   ELSE u.next_attempt_at END,"
	"  failed_at = CASE WHEN r.given_back THEN u.failed_at ELSE r.finished_at END,"
	"  http_status = CASE WHEN r.given_back THEN u.http_status ELSE nullif(r.http_status, 0) END,"
	"  error_class = CASE WHEN r.given_back THEN u.error_class ELSE r.error_class END,"
	"  message = CASE WHEN r.given_back THEN u.message ELSE r.message END,"
	"  attempt_no = u.attempt_no + (NOT r.given_back)::int, last_claim_id = r.claim_id"
	" FROM unnest($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14) WITH ORDINALITY AS r (push_id, claim_id, version, platform_id,"
	"  charged, permanent, blocked, given_back, is_probe, wait_ms, error_class, http_status, message, finished_at, place)"
	" CROSS JOIN LATERAL (SELECT z.max_retries, z.retry_interval, z.retry_factor, z.retry_delay_max FROM redrive.platforms AS z WHERE z.platform_id = r.platform_id OFFSET 0) AS p"
	" WHERE u.push_id = r.push_id AND u.last_claim_id < r.claim_id"
	" RETURNING r.place, u.attempt_no, r.charged",
	.nargs = 16,.argtypes = {INT8ARRAYOID, INT8ARRAYOID, INT8ARRAYOID, INT4ARRAYOID, BOOLARRAYOID, BOOLARRAYOID, BOOLARRAYOID, BOOLARRAYOID, BOOLARRAYOID, INT4ARRAYOID,
	TEXTARRAYOID, INT4ARRAYOID, TEXTARRAYOID, TIMESTAMPTZARRAYOID, TIMESTAMPTZOID, INT4OID}
};

/* Claims of which everything is recorded. */
static RedriveSql end_claims = {
	.lookups = true,
	.text = "DELETE FROM redrive.push_claims AS c USING unnest($1) AS n (claim_id) WHERE c.claim_id = n.claim_id",
	.nargs = 1,.argtypes = {INT8ARRAYOID}
};

/*
 * The configuration of platforms, which cannot change before we have committed;
 * those of which it is being changed are left out.
 */
static RedriveSql keep_platforms = {
	.lookups = true,
	.text =
	"SELECT p.platform_id::int8 AS platform_id, p.config_version FROM unnest($1) AS n (platform_id)"
	" CROSS JOIN LATERAL (SELECT x.platform_id, x.config_version FROM redrive.platforms AS x"
	"  WHERE x.platform_id = n.platform_id FOR SHARE SKIP LOCKED) AS p",
	.nargs = 1,.argtypes = {INT4ARRAYOID}
};

/* What build functions made for these is not needed any more. */
static RedriveSql delete_bodies = {
	.lookups = true,
	.text =
	"DELETE FROM redrive.push_bodies AS b USING unnest($1) AS n (push_id), redrive.pushes AS u"
	" WHERE b.push_id = n.push_id AND u.push_id = n.push_id AND u.state = 'delivered'",
	.nargs = 1,.argtypes = {INT8ARRAYOID}
};

static RedriveSql current_part = {
	"SELECT r.part::int8 AS part FROM redrive.rotation AS r",
	0, {0}
};

/* Columns of push_log, in the order of the table. */
enum
{
	L_PART, L_PUSH_ID, L_ATTEMPT, L_PLATFORM, L_VERSION, L_STARTED, L_FINISHED, L_DELIVERED, L_CHARGED, L_PROBE, L_CLASS, L_STATUS, L_CURL,
	L_MESSAGE, L_RESPONSE, L_COLUMNS
};

/* Rows of the log, gathered from both statements. */
typedef struct AttemptLog
{
	Datum	   *values;
	bool	   *nulls;
	int			n;
} AttemptLog;

/* Note the attempts of those that a statement returned. */
static void
note_attempts(AttemptLog *log, Push **pushes, uint64 rows, bool without_answers)
{
	for (uint64 row = 0; row < rows; row++)
	{
		Push	   *p = pushes[redrive_int64(row, "place") - 1];
		const char *response = without_answers ? NULL : p->response;
		Datum	   *values = log->values + log->n * L_COLUMNS;
		bool	   *nulls = log->nulls + log->n * L_COLUMNS;

		if (p->given_back)
			continue;
		log->n++;
		values[L_PUSH_ID] = Int64GetDatum(p->push_id);
		values[L_ATTEMPT] = Int64GetDatum(redrive_int64(row, "attempt_no"));
		values[L_PLATFORM] = Int32GetDatum(p->platform->platform_id);
		values[L_VERSION] = Int64GetDatum(p->version);
		values[L_STARTED] = TimestampTzGetDatum(p->started_at);
		values[L_FINISHED] = TimestampTzGetDatum(p->finished_at);
		values[L_DELIVERED] = BoolGetDatum(p->delivered);
		values[L_CHARGED] = BoolGetDatum(redrive_bool(row, "charged"));
		values[L_PROBE] = BoolGetDatum(p->is_probe);
		nulls[L_CLASS] = p->error_class == NULL;
		values[L_CLASS] = p->error_class != NULL ? CStringGetTextDatum(p->error_class) : (Datum) 0;
		nulls[L_STATUS] = p->status == 0;
		values[L_STATUS] = Int32GetDatum(p->status);
		nulls[L_CURL] = p->failure_code == 0;
		values[L_CURL] = Int32GetDatum(p->failure_code);
		nulls[L_MESSAGE] = p->message == NULL;
		values[L_MESSAGE] = p->message != NULL ? CStringGetTextDatum(p->message) : (Datum) 0;
		nulls[L_RESPONSE] = response == NULL;
		values[L_RESPONSE] = response != NULL ? CStringGetTextDatum(response) : (Datum) 0;
	}
}

/* Write the log. */
static void
write_log(AttemptLog *log)
{
	int			part;

	if (log->n == 0)
		return;
	redrive_sql_one_row(&current_part, NULL, NULL);
	part = (int) redrive_int64(0, "part");
	for (int i = 0; i < log->n; i++)
		log->values[i * L_COLUMNS + L_PART] = Int16GetDatum(part);
	redrive_table_insert(psprintf("push_log_%d", part), L_COLUMNS, log->n, log->values, log->nulls);
}

/*
 * A push that was blocked by the configuration of its platform waits for another one.
 * If it has changed since, or is about to, the push is tried again: nobody would come
 * back to it.
 */
static void
check_blocked(Push **pushes, int n)
{
	Datum	   *ids = palloc(n * sizeof(Datum));
	int			n_blocked = 0;
	Datum		args[1];
	uint64		rows;

	for (int i = 0; i < n; i++)
	{
		bool		listed = false;
		Datum		id = Int32GetDatum(pushes[i]->platform->platform_id);

		for (int b = 0; b < n_blocked; b++)
			listed |= ids[b] == id;
		if (pushes[i]->blocked && !listed)
			ids[n_blocked++] = id;
	}
	if (n_blocked == 0)
		return;
	args[0] = redrive_array(INT4OID, n_blocked, ids, NULL);
	rows = redrive_sql(&keep_platforms, args, NULL);
	for (int i = 0; i < n; i++)
	{
		bool		same = false;

		if (!pushes[i]->blocked)
			continue;
		for (uint64 row = 0; row < rows; row++)
			same |= redrive_int64(row, "platform_id") == pushes[i]->platform->platform_id &&
				redrive_int64(row, "config_version") == pushes[i]->config_version;
		if (!same)
		{
			pushes[i]->blocked = false;
			pushes[i]->given_back = true;
			pushes[i]->wait_ms = CHANGED_MS;
		}
	}
}

/* Write down those that were delivered. */
static void
record_delivered_pushes(Push **pushes, int n, AttemptLog *log, bool without_answers)
{
	Datum	   *ids = palloc(n * sizeof(Datum));
	Datum	   *claims = palloc(n * sizeof(Datum));
	Datum	   *versions = palloc(n * sizeof(Datum));
	Datum	   *statuses = palloc(n * sizeof(Datum));
	Datum		args[5];
	bool		any_built = false;

	for (int i = 0; i < n; i++)
	{
		ids[i] = Int64GetDatum(pushes[i]->push_id);
		claims[i] = Int64GetDatum(pushes[i]->claim->claim_id);
		versions[i] = Int64GetDatum(pushes[i]->version);
		statuses[i] = Int32GetDatum(pushes[i]->status);
		any_built |= pushes[i]->platform->has_build;
	}
	args[0] = redrive_array(INT8OID, n, ids, NULL);
	args[1] = redrive_array(INT8OID, n, claims, NULL);
	args[2] = redrive_array(INT8OID, n, versions, NULL);
	args[3] = redrive_array(INT4OID, n, statuses, NULL);
	args[4] = TimestampTzGetDatum(GetCurrentTimestamp());
	note_attempts(log, pushes, redrive_sql(&record_delivered, args, NULL), without_answers);
	if (any_built)
		(void) redrive_sql(&delete_bodies, args, NULL);
}

/* Write down those that were not. */
static void
record_failed_pushes(Push **pushes, int n, AttemptLog *log, bool without_answers)
{
	enum
	{
		ID, CLAIM, VERSION, PLATFORM, CHARGED, PERMANENT, BLOCKED, GIVEN_BACK, PROBE, WAIT, CLASS, STATUS, MESSAGE, FINISHED, N_COLUMNS
	};
	static const Oid types[N_COLUMNS] = {
		INT8OID, INT8OID, INT8OID, INT4OID, BOOLOID, BOOLOID, BOOLOID, BOOLOID, BOOLOID, INT4OID, TEXTOID, INT4OID, TEXTOID, TIMESTAMPTZOID
	};
	Datum	   *values[N_COLUMNS];
	bool	   *nulls[N_COLUMNS];
	Datum		args[N_COLUMNS + 2];

	for (int c = 0; c < N_COLUMNS; c++)
	{
		values[c] = palloc0(n * sizeof(Datum));
		nulls[c] = palloc0(n * sizeof(bool));
	}
#define SET_TEXT(column, text) \
	do { \
		if ((text) != NULL) values[column][i] = CStringGetTextDatum(text); else nulls[column][i] = true; \
	} while (0)
	for (int i = 0; i < n; i++)
	{
		Push	   *p = pushes[i];

		values[ID][i] = Int64GetDatum(p->push_id);
		values[CLAIM][i] = Int64GetDatum(p->claim->claim_id);
		values[VERSION][i] = Int64GetDatum(p->version);
		values[PLATFORM][i] = Int32GetDatum(p->platform->platform_id);
		values[CHARGED][i] = BoolGetDatum(p->charged);
		values[PERMANENT][i] = BoolGetDatum(p->permanent);
		values[BLOCKED][i] = BoolGetDatum(p->blocked);
		values[GIVEN_BACK][i] = BoolGetDatum(p->given_back);
		values[PROBE][i] = BoolGetDatum(p->is_probe);
		values[WAIT][i] = Int32GetDatum(p->wait_ms);
		SET_TEXT(CLASS, p->error_class);
		values[STATUS][i] = Int32GetDatum(p->status);
		SET_TEXT(MESSAGE, p->message);
		values[FINISHED][i] = TimestampTzGetDatum(p->finished_at);
	}
#undef SET_TEXT
	for (int c = 0; c < N_COLUMNS; c++)
		args[c] = redrive_array(types[c], n, values[c], nulls[c]);
	args[N_COLUMNS] = TimestampTzGetDatum(GetCurrentTimestamp());
	args[N_COLUMNS + 1] = Int32GetDatum(MAX_FREE_RETRIES);
	note_attempts(log, pushes, redrive_sql(&record_failed, args, NULL), without_answers);
}

/* Delete the claims that end with these pushes. */
static void
end_claims_of(Push **pushes, int n)
{
	Datum	   *ids = palloc(n * sizeof(Datum));
	int			n_ended = 0;
	Datum		args[1];

	for (int i = 0; i < n; i++)
		pushes[i]->claim->ending = 0;
	for (int i = 0; i < n; i++)
		if (++pushes[i]->claim->ending == pushes[i]->claim->left)
			ids[n_ended++] = Int64GetDatum(pushes[i]->claim->claim_id);
	if (n_ended == 0)
		return;
	args[0] = redrive_array(INT8OID, n_ended, ids, NULL);
	(void) redrive_sql(&end_claims, args, NULL);
}

/*
 * Write down what came of pushes.
 *
 * without_answers: leave out what platforms said, because it could not be
 * stored.
 */
void
redrive_record_pushes(Push **pushes, int n, bool without_answers)
{
	Push	  **delivered = palloc(n * sizeof(Push *));
	Push	  **failed = palloc(n * sizeof(Push *));
	int			n_delivered = 0,
				n_failed = 0;
	AttemptLog	log = {0};

	for (int i = 0; i < n; i++)
	{
		if (pushes[i]->delivered)
			delivered[n_delivered++] = pushes[i];
		else
			failed[n_failed++] = pushes[i];
	}
	check_blocked(failed, n_failed);
	log.values = palloc0(n * L_COLUMNS * sizeof(Datum));
	log.nulls = palloc0(n * L_COLUMNS * sizeof(bool));
	if (n_delivered > 0)
		record_delivered_pushes(delivered, n_delivered, &log, without_answers);
	if (n_failed > 0)
		record_failed_pushes(failed, n_failed, &log, without_answers);
	write_log(&log);
	end_claims_of(pushes, n);
}
