/*-------------------------------------------------------------------------
 *
 * report.c
 *	  What the views show of shared memory.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "catalog/pg_type.h"
#include "fmgr.h"
#include "funcapi.h"
#include "miscadmin.h"
#include "storage/fd.h"
#include "utils/acl.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/fmgrprotos.h"
#include "utils/timestamp.h"

#include "base/compat.h"
#include "base/guc.h"
#include "base/shmem.h"

#define SLOT_COLUMNS 14

PG_FUNCTION_INFO_V1(redrive__slots);
PG_FUNCTION_INFO_V1(redrive__processes);
PG_FUNCTION_INFO_V1(redrive__library_version);
PG_FUNCTION_INFO_V1(redrive__max_sockets);
PG_FUNCTION_INFO_V1(redrive__owner_needs_login);

static const char *
state_name(SlotState state)
{
	switch (state)
	{
		case SLOT_FREE:
			return "free";
		case SLOT_STARTING:
			return "starting";
		case SLOT_CLAIMING:
			return "claiming";
		case SLOT_RUNNING:
			return "running";
		case SLOT_CALLBACKS:
			return "callbacks";
		case SLOT_IDLE:
			return "idle";
	}
	return "unknown";
}

/*
 * SQL: _slots(), the live workers of this database that the caller may see:
 * those of its own roles, all of them for a monitor.
 *
 * The values of a slot are read without a lock against its process: a row may
 * mix two moments, which a view can bear.
 */
Datum
redrive__slots(PG_FUNCTION_ARGS)
{
	ReturnSetInfo *rsinfo = (ReturnSetInfo *) fcinfo->resultinfo;

	bool		monitor;

	InitMaterializedSRF(fcinfo, 0);
	if (redrive_shared == NULL)
		return (Datum) 0;
	monitor = DatumGetBool(DirectFunctionCall3(has_column_privilege_name_name,
											   CStringGetTextDatum("redrive.batches"),
											   CStringGetTextDatum("batch_id"),
											   CStringGetTextDatum("SELECT")));

	LWLockAcquire(redrive_shared->lock, LW_SHARED);
	for (int i = 0; i < REDRIVE_MAX_SLOTS; i++)
	{
		RedriveSlot slot = redrive_shared->slots[i];
		bool		running = slot.state == SLOT_RUNNING;
		Datum		values[SLOT_COLUMNS];
		bool		nulls[SLOT_COLUMNS] = {false};
		int			c = 0;

		if (slot.state == SLOT_FREE || slot.state == SLOT_STARTING || slot.database != MyDatabaseId)
			continue;
		if (!monitor && !has_privs_of_role(GetUserId(), slot.owner))
			continue;
		values[c++] = Int32GetDatum(slot.pid);
		values[c++] = CStringGetTextDatum(slot.foreground ? "foreground" : "executor");
		values[c++] = ObjectIdGetDatum(slot.owner);
		nulls[c] = !running;
		values[c++] = Int32GetDatum(slot.handler_id);
		nulls[c] = !running;
		values[c++] = Int64GetDatum(slot.batch_id);
		nulls[c] = !running;
		values[c++] = Int64GetDatum(slot.chunk_id);
		values[c++] = CStringGetTextDatum(state_name(slot.state));
		values[c++] = Int64GetDatum(running ? slot.open_succeeded : 0);
		values[c++] = Int64GetDatum(running ? slot.open_failed : 0);
		nulls[c] = !running || slot.item_no == 0;
		values[c++] = Int64GetDatum(slot.item_no);
		nulls[c] = !running || slot.item_no == 0;
		values[c++] = TimestampTzGetDatum(slot.item_started_at);
		nulls[c] = !running;
		values[c++] = TimestampTzGetDatum(slot.claimed_at);
		nulls[c] = !running || slot.items_per_second <= 0;
		values[c++] = Float8GetDatum(slot.items_per_second);
		values[c++] = TimestampTzGetDatum(slot.started_at);
		tuplestore_putvalues(rsinfo->setResult, rsinfo->setDesc, values, nulls);
	}
	LWLockRelease(redrive_shared->lock);
	return (Datum) 0;
}

/*
 * SQL: _processes(), the background processes that serve this database, and
 * what keeps others from being started.  NULLs without preload.
 *
 * Takes executors of all databases into account; they share one limit.
 */
Datum
redrive__processes(PG_FUNCTION_ARGS)
{
	TupleDesc	tupdesc;
	Datum		values[6] = {0};
	bool		nulls[6] = {true, true, true, true, true, true};
	Datum		held_back[REDRIVE_MAX_HELD_BACK];
	int			n_held_back = 0;
	int			databases = 0;
	RedriveDatabase *own;
	TimestampTz now = GetCurrentTimestamp();

	if (get_call_result_type(fcinfo, NULL, &tupdesc) != TYPEFUNC_COMPOSITE)
		elog(ERROR, "return type must be a row type");
	if (redrive_shared == NULL)
		return HeapTupleGetDatum(heap_form_tuple(tupdesc, values, nulls));

	LWLockAcquire(redrive_shared->lock, LW_SHARED);
	values[0] = Int32GetDatum(redrive_shared->launcher_pid);
	nulls[0] = redrive_shared->launcher_pid == 0;
	for (int i = 0; i < redrive_max_databases; i++)
		if (redrive_shared->databases[i].present)
			databases++;
	values[2] = Int32GetDatum(databases);
	values[3] = Int32GetDatum(redrive_count_executors());
	nulls[2] = nulls[3] = false;
	own = redrive_find_database(MyDatabaseId);
	if (own != NULL)
	{
		values[1] = Int32GetDatum(own->pid);
		nulls[1] = own->pid == 0;
		values[4] = TimestampTzGetDatum(own->no_process_since);
		nulls[4] = own->no_process_since == 0;
		for (int i = 0; i < REDRIVE_MAX_HELD_BACK; i++)
			if (own->held_back[i].until > now)
				held_back[n_held_back++] = ObjectIdGetDatum(own->held_back[i].owner);
	}
	LWLockRelease(redrive_shared->lock);
	values[5] = PointerGetDatum(construct_array(held_back, n_held_back, OIDOID, sizeof(Oid), true, TYPALIGN_INT));
	nulls[5] = false;
	return HeapTupleGetDatum(heap_form_tuple(tupdesc, values, nulls));
}

/* SQL: _max_sockets(), how many AcquireExternalFD() gives to a process */
Datum
redrive__max_sockets(PG_FUNCTION_ARGS)
{
	PG_RETURN_INT32(max_safe_fds / 3);
}

/* SQL: _library_version(), that of the library that is loaded */
Datum
redrive__library_version(PG_FUNCTION_ARGS)
{
	PG_RETURN_TEXT_P(cstring_to_text(REDRIVE_VERSION));
}

/* SQL: _owner_needs_login(), for a worker to connect as that role */
Datum
redrive__owner_needs_login(PG_FUNCTION_ARGS)
{
	PG_RETURN_BOOL(REDRIVE_OWNER_NEEDS_LOGIN);
}
