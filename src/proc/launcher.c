/*-------------------------------------------------------------------------
 *
 * launcher.c
 *	  One process that starts a supervisor per database.
 *
 * Connected to no database; reads pg_database only.  Which databases have the
 * extension is found out by starting a supervisor there once: one that finds
 * nothing says so in shared memory and exits.  A supervisor that ends in an
 * error is started again after a delay that doubles.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/genam.h"
#include "access/heapam.h"
#include "access/htup_details.h"
#include "access/tableam.h"
#include "catalog/pg_database.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "postmaster/bgworker.h"
#include "postmaster/interrupt.h"
#include "storage/ipc.h"
#include "storage/latch.h"
#include "storage/procsignal.h"
#include "tcop/tcopprot.h"
#include "utils/guc.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

#include "base/backoff.h"
#include "base/compat.h"
#include "base/guc.h"
#include "base/shmem.h"
#include "base/xact.h"
#include "proc/launcher.h"

/* New databases, made from a template that has the extension, are found so often. */
#define SCAN_MS 60000
#define RESTART_US 1000000
#define RESTART_MAX_US INT64CONST(60000000)

/* Register the launcher; called while preloading. */
void
redrive_register_launcher(void)
{
	BackgroundWorker worker = {0};

	if (IsBinaryUpgrade)
		return;
	worker.bgw_flags = BGWORKER_SHMEM_ACCESS | BGWORKER_BACKEND_DATABASE_CONNECTION;
	worker.bgw_start_time = BgWorkerStart_RecoveryFinished;
	worker.bgw_restart_time = 1;
	snprintf(worker.bgw_library_name, BGW_MAXLEN, "pg_redrive");
	snprintf(worker.bgw_function_name, BGW_MAXLEN, "redrive_launcher_main");
	snprintf(worker.bgw_name, BGW_MAXLEN, "redrive launcher");
	snprintf(worker.bgw_type, BGW_MAXLEN, "redrive launcher");
	RegisterBackgroundWorker(&worker);
}

static void
leave_shmem(int code, Datum arg)
{
	LWLockAcquire(redrive_shared->lock, LW_EXCLUSIVE);
	redrive_shared->launcher_pid = 0;
	redrive_shared->launcher_latch = NULL;
	LWLockRelease(redrive_shared->lock);
}

/* Return the databases that can be connected to, as a list of oids in cxt. */
static List *
list_databases(MemoryContext cxt)
{
	List	   *result = NIL;
	Relation	rel;
	TableScanDesc scan;
	HeapTuple	tuple;

	redrive_catalog_begin();
	rel = table_open(DatabaseRelationId, AccessShareLock);
	scan = table_beginscan_catalog(rel, 0, NULL);
	while ((tuple = heap_getnext(scan, ForwardScanDirection)) != NULL)
	{
		Form_pg_database form = (Form_pg_database) GETSTRUCT(tuple);

		if (form->datallowconn && !form->datistemplate)
		{
			MemoryContext old_cxt = MemoryContextSwitchTo(cxt);

			result = lappend_oid(result, form->oid);
			MemoryContextSwitchTo(old_cxt);
		}
	}
	table_endscan(scan);
	table_close(rel, AccessShareLock);
	redrive_catalog_end();
	return result;
}

/* Bring shared memory in line with the databases there are. */
static void
scan_databases(MemoryContext cxt)
{
	List	   *databases = list_databases(cxt);
	ListCell   *lc;
	static bool warned = false;
	bool		full = false;

	LWLockAcquire(redrive_shared->lock, LW_EXCLUSIVE);
	for (int i = 0; i < redrive_max_databases; i++)
	{
		RedriveDatabase *entry = &redrive_shared->databases[i];

		/* dropped, or empty of us: the place is free again */
		if (OidIsValid(entry->database) && entry->pid == 0 &&
			!list_member_oid(databases, entry->database))
			memset(entry, 0, sizeof(RedriveDatabase));
	}
	foreach(lc, databases)
	{
		RedriveDatabase *entry = redrive_find_database(lfirst_oid(lc), false);

		if (entry != NULL)
			continue;
		entry = redrive_find_database(lfirst_oid(lc), true);
		for (int i = 0; entry == NULL && i < redrive_max_databases; i++)
		{
			/* make room: one without the extension is looked at again later */
			if (redrive_shared->databases[i].pid == 0 && !redrive_shared->databases[i].present &&
				!redrive_shared->databases[i].probe)
			{
				memset(&redrive_shared->databases[i], 0, sizeof(RedriveDatabase));
				entry = redrive_find_database(lfirst_oid(lc), true);
			}
		}
		if (entry == NULL)
			full = true;
		else
			entry->probe = true;
	}
	LWLockRelease(redrive_shared->lock);
	if (full && !warned)
		ereport(WARNING,
				(errcode(ERRCODE_CONFIGURATION_LIMIT_EXCEEDED),
				 errmsg("not all databases can have pg_redrive workers"),
				 errhint("Increase redrive.max_databases, now %d.", redrive_max_databases)));
	warned = full;
}

/* Register a supervisor; false when there is no free worker process. */
static bool
start_supervisor(Oid database)
{
	BackgroundWorker worker = {0};

	worker.bgw_flags = BGWORKER_SHMEM_ACCESS | BGWORKER_BACKEND_DATABASE_CONNECTION;
	worker.bgw_start_time = BgWorkerStart_RecoveryFinished;
	worker.bgw_restart_time = BGW_NEVER_RESTART;
	worker.bgw_notify_pid = MyProcPid;
	worker.bgw_main_arg = ObjectIdGetDatum(database);
	snprintf(worker.bgw_library_name, BGW_MAXLEN, "pg_redrive");
	snprintf(worker.bgw_function_name, BGW_MAXLEN, "redrive_supervisor_main");
	snprintf(worker.bgw_name, BGW_MAXLEN, "redrive supervisor");
	snprintf(worker.bgw_type, BGW_MAXLEN, "redrive supervisor");
	return RegisterDynamicBackgroundWorker(&worker, NULL);
}

/*
 * Start the supervisors that are due; return how long to sleep in ms.
 *
 * An entry with probe set and no pid gets one.  The entry's pid is set by the
 * supervisor; until then retry_at keeps us from starting a second one.
 */
static long
start_supervisors(void)
{
	TimestampTz now = GetCurrentTimestamp();
	long		sleep_ms = SCAN_MS;
	static bool warned = false;
	bool		shortage = false;

	for (int i = 0; i < redrive_max_databases; i++)
	{
		RedriveDatabase *entry = &redrive_shared->databases[i];
		Oid			database = InvalidOid;

		LWLockAcquire(redrive_shared->lock, LW_EXCLUSIVE);
		if (OidIsValid(entry->database) && entry->pid == 0 && entry->probe)
		{
			if (entry->retry_at <= now)
			{
				database = entry->database;
				entry->retry_at = now + redrive_backoff(RESTART_US, 2, RESTART_MAX_US,
														entry->errors, database);
				entry->errors++;	/* set to 0 by a supervisor that works */
			}
			sleep_ms = Min(sleep_ms, Max(TimestampDifferenceMilliseconds(now, entry->retry_at), 10));
		}
		LWLockRelease(redrive_shared->lock);
		if (OidIsValid(database))
		{
			bool		started = start_supervisor(database);

			LWLockAcquire(redrive_shared->lock, LW_EXCLUSIVE);
			if (started)
				entry->no_process_since = 0;
			else if (entry->no_process_since == 0)
				entry->no_process_since = now;
			LWLockRelease(redrive_shared->lock);
			if (!started)
				shortage = true;
		}
	}
	if (shortage && !warned)
		ereport(WARNING,
				(errcode(ERRCODE_CONFIGURATION_LIMIT_EXCEEDED),
				 errmsg("could not start a pg_redrive supervisor"),
				 errdetail("There is no free background worker process."),
				 errhint("Increase max_worker_processes, now %d.", max_worker_processes)));
	warned = shortage;
	return sleep_ms;
}

/* Main function of the launcher process. */
void
redrive_launcher_main(Datum arg)
{
	MemoryContext loop_cxt;
	uint32		wait_event;

	pqsignal(SIGHUP, SignalHandlerForConfigReload);
	pqsignal(SIGTERM, SignalHandlerForShutdownRequest);
	BackgroundWorkerUnblockSignals();
	BackgroundWorkerInitializeConnection(NULL, NULL, 0);
	wait_event = redrive_wait_event("RedriveLauncherMain");
	loop_cxt = AllocSetContextCreate(TopMemoryContext, "redrive launcher", ALLOCSET_DEFAULT_SIZES);

	LWLockAcquire(redrive_shared->lock, LW_EXCLUSIVE);
	redrive_shared->launcher_pid = MyProcPid;
	redrive_shared->launcher_latch = MyLatch;
	LWLockRelease(redrive_shared->lock);
	before_shmem_exit(leave_shmem, 0);

	while (!ShutdownRequestPending)
	{
		long		sleep_ms;

		CHECK_FOR_INTERRUPTS();
		if (ConfigReloadPending)
		{
			ConfigReloadPending = false;
			ProcessConfigFile(PGC_SIGHUP);
		}
		MemoryContextReset(loop_cxt);
		MemoryContextSwitchTo(loop_cxt);

		/* each turn: none is started in a database that has been dropped */
		scan_databases(loop_cxt);
		sleep_ms = start_supervisors();
		(void) WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH, sleep_ms, wait_event);
		ResetLatch(MyLatch);
	}

	/*
	 * with 0 the postmaster would not start it again after
	 * pg_terminate_backend
	 */
	proc_exit(1);
}
