/*-------------------------------------------------------------------------
 *
 * submit.c
 *	  Submit batches and items.
 *
 * Everything is part of the caller's transaction.  Items are packed into
 * blocks of neighbours, one row each; a good item never writes again.  The
 * caller's identity is checked here; rows are stored with our rights.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "miscadmin.h"
#include "utils/acl.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

#include "base/shmem.h"
#include "base/spi_call.h"
#include "base/wake.h"
#include "base/xact.h"
#include "flow/block.h"

#define FETCH_ROWS 1000
/* 10000 years: '9999-12-31' may mean never, and passes add up to 100 years */
#define RUN_AT_MAX_AHEAD_US (INT64CONST(3652425) * USECS_PER_DAY)

PG_FUNCTION_INFO_V1(redrive_submit);
PG_FUNCTION_INFO_V1(redrive_submit_query);
PG_FUNCTION_INFO_V1(redrive_open_batch);
PG_FUNCTION_INFO_V1(redrive_add_items);
PG_FUNCTION_INFO_V1(redrive_send);

/* What submit, submit_query and open_batch have in common. */
typedef struct Submission
{
	text	   *handler;
	Datum		run_at;			/* timestamptz */
	bool		run_at_isnull;
	int32		priority;
	text	   *label;			/* or NULL */
	text	   *idempotency_key;	/* or NULL */

	/* found out */
	int32		handler_id;
	Oid			owner;
	bool		external;		/* no worker of ours will run it */
	bool		notify;
	int16		part;
	int64		batch_id;
} Submission;

/* Locked as the foreign key does it, but before anything depends on it. */
static RedriveSql find_handler = {
	"SELECT h.handler_id, h.owner::oid AS owner, h.kind = 'external' AS external, h.notify, r.part"
	" FROM redrive.handlers AS h CROSS JOIN redrive.rotation AS r WHERE h.name = $1 FOR KEY SHARE OF h",
	1, {TEXTOID}
};

static RedriveSql insert_batch = {
	"INSERT INTO redrive.batches (handler_id, part, state, priority, total, keyed, submitted_by,"
	" run_at, serve_after, label, idempotency_key, sealed_at)"
	" VALUES ($1, $2, $3::redrive.batch_state, $4, $5, $6, $7, coalesce($8, now()), coalesce($8, now()), $9, $10,"
	" CASE WHEN $3 <> 'open' THEN clock_timestamp() END)"
	" ON CONFLICT (handler_id, idempotency_key) WHERE idempotency_key IS NOT NULL DO NOTHING"
	" RETURNING batch_id",
	10, {INT4OID, INT2OID, TEXTOID, INT4OID, INT8OID, BOOLOID, OIDOID, TIMESTAMPTZOID, TEXTOID, TEXTOID}
};

static RedriveSql find_idempotent = {
	"SELECT batch_id FROM redrive.batches WHERE handler_id = $1 AND idempotency_key = $2",
	2, {INT4OID, TEXTOID}
};

static RedriveSql find_open_batch = {
	"SELECT b.handler_id, b.part, b.state::text AS state, b.total, h.owner::oid AS owner"
	" FROM redrive.batches AS b JOIN redrive.handlers AS h ON h.handler_id = b.handler_id"
	" WHERE b.batch_id = $1 FOR UPDATE OF b",
	1, {INT8OID}
};

static RedriveSql set_total = {
	"UPDATE redrive.batches SET total = $2, keyed = keyed OR $3, last_progress_at = clock_timestamp(),"
	" state = CASE WHEN $4 THEN 'ready'::redrive.batch_state ELSE state END,"
	" sealed_at = CASE WHEN $4 THEN clock_timestamp() ELSE sealed_at END"
	" WHERE batch_id = $1",
	4, {INT8OID, INT8OID, BOOLOID, BOOLOID}
};

static RedriveSql notify = {
	"SELECT redrive._notify($1)",
	1, {INT4OID}
};

/* Say once per session that nobody will run what is submitted. */
static void
notice_not_preloaded(Submission *submission)
{
	static bool said = false;

	if (redrive_shared == NULL && !submission->external && !said)
	{
		said = true;
		ereport(NOTICE,
				(errmsg("no workers will run this batch"),
				 errdetail("pg_redrive is not in shared_preload_libraries."),
				 errhint("Add it and restart the server, or run the work with CALL redrive.work().")));
	}
}

/* Refuse a submitter who has not the rights of the handler's owner. */
static void
check_member(Oid owner, const char *what)
{
	if (!has_privs_of_role(GetUserId(), owner))
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("permission denied for %s", what),
				 errdetail("It belongs to another role."),
				 errhint("Ask a member of the owning role to submit, or to grant you its role.")));
}

/* Look the handler up and check that the caller may submit to it. */
static void
resolve_handler(Submission *submission)
{
	Datum		values[1] = {PointerGetDatum(submission->handler)};
	bool		isnull;
	char	   *name;

	if (submission->handler == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
				 errmsg("handler must not be null"),
				 errhint("Give the name of a handler made with redrive.create_handler().")));
	name = text_to_cstring(submission->handler);
	if (redrive_sql(&find_handler, values, NULL) == 0)
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_OBJECT),
				 errmsg("handler \"%s\" does not exist", name),
				 errhint("Create it with redrive.create_handler(), or look at redrive.queue_stats for the names there are.")));
	submission->handler_id = DatumGetInt32(redrive_column(0, "handler_id", &isnull));
	submission->owner = DatumGetObjectId(redrive_column(0, "owner", &isnull));
	submission->part = DatumGetInt16(redrive_column(0, "part", &isnull));
	submission->external = redrive_bool(0, "external");
	submission->notify = redrive_bool(0, "notify");
	check_member(submission->owner, psprintf("handler \"%s\"", name));
	if (!submission->run_at_isnull &&
		(TIMESTAMP_IS_NOBEGIN(DatumGetTimestampTz(submission->run_at)) ||
		 DatumGetTimestampTz(submission->run_at) > GetCurrentTimestamp() + RUN_AT_MAX_AHEAD_US))
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("run_at is out of range"),
				 errdetail("It is \"%s\".", DatumGetCString(DirectFunctionCall1(timestamptz_out, submission->run_at))),
				 errhint("Give a time within the next 10000 years; redrive.open_batch() prepares a batch without a time.")));
}

/*
 * Insert the batch row.
 *
 * Returns false, with batch_id set, when the idempotency key has been used.
 */
static bool
create_batch(Submission *submission, const char *state, int64 total, bool keyed)
{
	Datum		values[10];
	char		nulls[] = "          ";
	Datum		idempotent[2];

	values[0] = Int32GetDatum(submission->handler_id);
	values[1] = Int16GetDatum(submission->part);
	values[2] = CStringGetTextDatum(state);
	values[3] = Int32GetDatum(submission->priority);
	values[4] = Int64GetDatum(total);
	values[5] = BoolGetDatum(keyed);
	values[6] = ObjectIdGetDatum(GetUserId());
	values[7] = submission->run_at;
	nulls[7] = submission->run_at_isnull ? 'n' : ' ';
	values[8] = PointerGetDatum(submission->label);
	nulls[8] = submission->label == NULL ? 'n' : ' ';
	values[9] = PointerGetDatum(submission->idempotency_key);
	nulls[9] = submission->idempotency_key == NULL ? 'n' : ' ';
	if (redrive_sql(&insert_batch, values, nulls) == 1)
	{
		submission->batch_id = redrive_int64(0, "batch_id");
		return true;
	}
	idempotent[0] = values[0];
	idempotent[1] = values[9];
	redrive_sql_one_row(&find_idempotent, idempotent, NULL);
	submission->batch_id = redrive_int64(0, "batch_id");
	return false;
}

/* Take payloads and keys apart and check them; *keys is NULL without keys. */
static int
deconstruct_items(ArrayType *payload_array, ArrayType *key_array,
				  Datum **payloads, Datum **keys, bool **key_nulls)
{
	bool	   *nulls;
	int			n;
	int			n_keys;

	if (payload_array == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
				 errmsg("payloads must not be null"),
				 errhint("Give an array with one jsonb value per item.")));
	if (ARR_NDIM(payload_array) > 1 || (key_array != NULL && ARR_NDIM(key_array) > 1))
		ereport(ERROR,
				(errcode(ERRCODE_ARRAY_SUBSCRIPT_ERROR),
				 errmsg("payloads and keys must be one-dimensional arrays"),
				 errdetail("Payloads have %d dimensions, keys %d.", ARR_NDIM(payload_array), key_array == NULL ? 0 : ARR_NDIM(key_array)),
				 errhint("Give one element per item.")));
	deconstruct_array(payload_array, JSONBOID, -1, false, TYPALIGN_INT, payloads, &nulls, &n);
	if (n == 0)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("payloads must not be empty"),
				 errhint("Give an array with one jsonb value per item, such as ARRAY['{}']::jsonb[], or use redrive.open_batch() to add items later.")));
	for (int i = 0; i < n; i++)
		if (nulls[i])
			ereport(ERROR,
					(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
					 errmsg("payload %d is null", i + 1),
					 errhint("Use the JSON value null, or an empty object, for an item without data.")));
	*keys = NULL;
	*key_nulls = NULL;
	if (key_array != NULL)
	{
		deconstruct_array(key_array, TEXTOID, -1, false, TYPALIGN_INT, keys, key_nulls, &n_keys);
		if (n_keys != n)
			ereport(ERROR,
					(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
					 errmsg("payloads and keys must have the same length"),
					 errdetail("There are %d payloads and %d keys.", n, n_keys),
					 errhint("Give one key per payload; NULL where there is none.")));
	}
	return n;
}

/* Have the batch run after the commit; the supervisor waits for a set time. */
static void
wake(Submission *submission)
{
	if (submission->external)
	{
		Datum		values[1] = {Int32GetDatum(submission->handler_id)};

		/* those who wait look when it is due, too */
		redrive_wake_claimers_at_commit(submission->owner);
		if (submission->notify && submission->run_at_isnull)
			(void) redrive_sql(&notify, values, NULL);
	}
	else if (submission->run_at_isnull)
		redrive_wake_at_commit(submission->owner, submission->batch_id);
	else
		redrive_wake_supervisor_at_commit();
}

/* Submit a sealed batch of items that are all here. */
static int64
submit_items(Submission *submission, int n, Datum *payloads, Datum *keys, bool *key_nulls)
{
	bool		keyed = false;

	for (int i = 0; keys != NULL && i < n && !keyed; i++)
		keyed = !key_nulls[i];
	redrive_connect();
	resolve_handler(submission);
	if (create_batch(submission, "ready", n, keyed))
	{
		BlockWriter *writer = redrive_block_writer(submission->part, submission->batch_id, 0);

		for (int i = 0; i < n; i++)
			redrive_add_item(writer, payloads[i], keys ? keys[i] : (Datum) 0, keys ? key_nulls[i] : true);
		redrive_flush_block(writer);
		redrive_lock_keys(writer, submission->handler_id, 1);
		wake(submission);
	}
	redrive_disconnect();
	notice_not_preloaded(submission);
	return submission->batch_id;
}

/* Read the arguments run_at, priority, label and idempotency_key. */
static void
common_arguments(FunctionCallInfo fcinfo, Submission *submission, int first)
{
	redrive_require_writable(fcinfo);
	submission->handler = PG_ARGISNULL(0) ? NULL : PG_GETARG_TEXT_PP(0);
	submission->run_at = PG_GETARG_DATUM(first);
	submission->run_at_isnull = PG_ARGISNULL(first);
	submission->priority = PG_ARGISNULL(first + 1) ? 0 : PG_GETARG_INT32(first + 1);
	submission->label = PG_ARGISNULL(first + 2) ? NULL : PG_GETARG_TEXT_PP(first + 2);
	submission->idempotency_key = PG_ARGISNULL(first + 3) ? NULL : PG_GETARG_TEXT_PP(first + 3);
	if (submission->idempotency_key != NULL)
		redrive_check_key(submission->idempotency_key, "idempotency_key");
}

/* SQL: submit(handler, payloads, keys, run_at, priority, label, idempotency_key) */
Datum
redrive_submit(PG_FUNCTION_ARGS)
{
	Submission	submission = {0};
	Datum	   *payloads;
	Datum	   *keys;
	bool	   *key_nulls;
	int			n;

	common_arguments(fcinfo, &submission, 3);
	n = deconstruct_items(PG_ARGISNULL(1) ? NULL : PG_GETARG_ARRAYTYPE_P(1),
						  PG_ARGISNULL(2) ? NULL : PG_GETARG_ARRAYTYPE_P(2),
						  &payloads, &keys, &key_nulls);
	PG_RETURN_INT64(submit_items(&submission, n, payloads, keys, key_nulls));
}

/* SQL: send(handler, payload, key, delay, run_at) */
Datum
redrive_send(PG_FUNCTION_ARGS)
{
	Submission	submission = {0};
	Datum		payload;
	Datum		key;
	bool		key_isnull = PG_ARGISNULL(2);

	redrive_require_writable(fcinfo);
	submission.handler = PG_ARGISNULL(0) ? NULL : PG_GETARG_TEXT_PP(0);
	if (PG_ARGISNULL(1))
		ereport(ERROR,
				(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
				 errmsg("payload must not be null"),
				 errhint("Use the JSON value null, or an empty object, for an item without data.")));
	if (!PG_ARGISNULL(3) && !PG_ARGISNULL(4))
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("delay and run_at cannot both be given"),
				 errhint("Give one of them.")));
	submission.run_at_isnull = PG_ARGISNULL(3) && PG_ARGISNULL(4);
	if (!PG_ARGISNULL(4))
		submission.run_at = PG_GETARG_DATUM(4);
	else if (!PG_ARGISNULL(3))
		submission.run_at = DirectFunctionCall2(timestamptz_pl_interval,
												TimestampTzGetDatum(GetCurrentTimestamp()),
												PG_GETARG_DATUM(3));
	payload = PointerGetDatum(PG_DETOAST_DATUM(PG_GETARG_DATUM(1)));
	key = key_isnull ? (Datum) 0 : PointerGetDatum(PG_GETARG_TEXT_PP(2));
	PG_RETURN_INT64(submit_items(&submission, 1, &payload, &key, &key_isnull));
}

/* SQL: open_batch(handler, run_at, priority, label, idempotency_key) */
Datum
redrive_open_batch(PG_FUNCTION_ARGS)
{
	Submission	submission = {0};

	common_arguments(fcinfo, &submission, 1);
	redrive_connect();
	resolve_handler(&submission);
	(void) create_batch(&submission, "open", 0, false);
	redrive_disconnect();
	PG_RETURN_INT64(submission.batch_id);
}

/* Store how many items a batch has; ready = seal it. */
static void
store_total(int64 batch_id, int64 total, bool keyed, bool ready)
{
	Datum		values[4];

	values[0] = Int64GetDatum(batch_id);
	values[1] = Int64GetDatum(total);
	values[2] = BoolGetDatum(keyed);
	values[3] = BoolGetDatum(ready);
	(void) redrive_sql(&set_total, values, NULL);
}

/* SQL: add_items(batch_id, payloads, keys) */
Datum
redrive_add_items(PG_FUNCTION_ARGS)
{
	Datum	   *payloads;
	Datum	   *keys;
	bool	   *key_nulls;
	Datum		values[1];
	bool		isnull;
	char	   *state;
	int32		handler_id;
	int64		before;
	BlockWriter *writer;
	int			n;

	redrive_require_writable(fcinfo);
	if (PG_ARGISNULL(0))
		ereport(ERROR,
				(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
				 errmsg("batch_id must not be null"),
				 errhint("Give the number that redrive.open_batch() returned.")));
	n = deconstruct_items(PG_ARGISNULL(1) ? NULL : PG_GETARG_ARRAYTYPE_P(1),
						  PG_ARGISNULL(2) ? NULL : PG_GETARG_ARRAYTYPE_P(2),
						  &payloads, &keys, &key_nulls);
	redrive_connect();
	values[0] = PG_GETARG_DATUM(0);
	if (redrive_sql(&find_open_batch, values, NULL) == 0)
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_OBJECT),
				 errmsg("batch %lld does not exist", (long long) PG_GETARG_INT64(0)),
				 errhint("See redrive.batch_progress for the batches there are.")));
	check_member(DatumGetObjectId(redrive_column(0, "owner", &isnull)),
				 psprintf("batch %lld", (long long) PG_GETARG_INT64(0)));
	state = redrive_text(0, "state", CurrentMemoryContext);
	if (strcmp(state, "open") != 0)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("batch %lld is not open", (long long) PG_GETARG_INT64(0)),
				 errdetail("Its state is \"%s\".", state),
				 errhint("Items can be added until redrive.seal_batch() is called.")));
	handler_id = DatumGetInt32(redrive_column(0, "handler_id", &isnull));
	before = redrive_int64(0, "total");
	writer = redrive_block_writer(DatumGetInt16(redrive_column(0, "part", &isnull)), PG_GETARG_INT64(0), before);
	for (int i = 0; i < n; i++)
		redrive_add_item(writer, payloads[i], keys ? keys[i] : (Datum) 0, keys ? key_nulls[i] : true);
	redrive_flush_block(writer);
	redrive_lock_keys(writer, handler_id, before + 1);
	store_total(PG_GETARG_INT64(0), before + n, writer->keys_total > 0, false);
	redrive_disconnect();
	PG_RETURN_INT64(before + n);
}

/* SQL: submit_query(handler, query, run_at, priority, label, idempotency_key) */
Datum
redrive_submit_query(PG_FUNCTION_ARGS)
{
	Submission	submission = {0};

	if (PG_ARGISNULL(1))
		ereport(ERROR,
				(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
				 errmsg("query must not be null"),
				 errhint("Give a query that yields (key text, payload jsonb).")));
	common_arguments(fcinfo, &submission, 2);
	redrive_connect();
	resolve_handler(&submission);
	if (create_batch(&submission, "open", 0, false))
	{
		BlockWriter *writer = redrive_block_writer(submission.part, submission.batch_id, 0);
		Oid			columns[] = {TEXTOID, JSONBOID};
		RedriveQuery *query = redrive_query_open(text_to_cstring(PG_GETARG_TEXT_PP(1)), 2, columns,
												 "(key text, payload jsonb)");
		MemoryContext fetch_cxt = AllocSetContextCreate(CurrentMemoryContext, "redrive fetch",
														ALLOCSET_DEFAULT_SIZES);
		int			n;
		int64		total;

		/* the query runs as the caller; only storing switches the identity */
		while ((n = redrive_query_fetch(query, FETCH_ROWS)) > 0)
		{
			MemoryContext old_cxt = MemoryContextSwitchTo(fetch_cxt);

			for (int i = 0; i < n; i++)
			{
				bool		key_isnull;
				bool		payload_isnull;
				Datum		key = redrive_query_column(query, i, 1, &key_isnull);
				Datum		payload = redrive_query_column(query, i, 2, &payload_isnull);

				if (payload_isnull)
					ereport(ERROR,
							(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
							 errmsg("payload of row " INT64_FORMAT " is null",
									writer->first_no + writer->items),
							 errhint("Use the JSON value null, or an empty object, for an item without data.")));
				redrive_add_item(writer, PointerGetDatum(PG_DETOAST_DATUM(payload)), key, key_isnull);
			}
			/* the datums of this fetch go away with the next one */
			redrive_flush_block(writer);
			MemoryContextSwitchTo(old_cxt);
			MemoryContextReset(fetch_cxt);
		}
		redrive_query_close(query);
		total = writer->first_no - 1;
		if (total == 0)
			ereport(ERROR,
					(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
					 errmsg("the query returned no rows"),
					 errhint("Submit at least one item, or use redrive.open_batch().")));
		redrive_lock_keys(writer, submission.handler_id, 1);
		store_total(submission.batch_id, total, writer->keys_total > 0, true);
		wake(&submission);
	}
	redrive_disconnect();
	notice_not_preloaded(&submission);
	PG_RETURN_INT64(submission.batch_id);
}
