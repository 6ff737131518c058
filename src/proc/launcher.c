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

/* A look at all databases, for those that are new, at least so often. */
#define SCAN_MS 60000
#define RESTART_US 1000000
#define RESTART_MAX_US INT64CONST(60000000)

/* A shortage that comes back sooner than this is the same one. */
#define CLEARED_US INT64CONST(60000000)

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

/* Return the databases that can be connected to, as a sorted list of oids in cxt. */
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

		/* a limit of -2 says that dropping it was not completed */
		if (form->datallowconn && !form->datistemplate && form->datconnlimit >= -1)
		{
			MemoryContext old_cxt = MemoryContextSwitchTo(cxt);

			result = lappend_oid(result, form->oid);
			MemoryContextSwitchTo(old_cxt);
		}
	}
	table_endscan(scan);
	table_close(rel, AccessShareLock);
	redrive_catalog_end();
	list_sort(result, list_oid_cmp);
	return result;
}

/*
 * Bring shared memory in line with the databases there are.
 *
 * When there are more of them than entries, those without one take turns, once
 * per SCAN_MS each, in the place of one that does not have the extension.
 */
static void
scan_databases(MemoryContext cxt)
{
	static TimestampTz round_began = 0;
	static Oid	looked_to = InvalidOid; /* in this round, in the order of oids */
	static bool warned = false;
	TimestampTz now = GetCurrentTimestamp();
	List	   *databases = list_databases(cxt);
	ListCell   *lc;
	bool		any_left_out = false;
	bool		turn_is_over = false;
	int			present = 0;

	if (TimestampDifferenceExceeds(round_began, now, SCAN_MS))
	{
		round_began = now;
		looked_to = InvalidOid;
	}
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
		Oid			database = lfirst_oid(lc);
		bool		has_turn = database > looked_to && !turn_is_over;

		if (redrive_find_database(database) == NULL)
		{
			RedriveDatabase *entry = redrive_enter_database(database, has_turn);

			if (entry != NULL)
				entry->probe = true;
			else
			{
				any_left_out = true;
				/* until a supervisor that looks now has ended */
				if (has_turn)
					turn_is_over = true;
			}
		}
		if (has_turn && !turn_is_over)
			looked_to = database;
	}
	for (int i = 0; i < redrive_max_databases; i++)
		if (redrive_shared->databases[i].present)
			present++;
	LWLockRelease(redrive_shared->lock);

	if (any_left_out && present == redrive_max_databases && !warned)
	{
		ereport(WARNING,
				(errcode(ERRCODE_CONFIGURATION_LIMIT_EXCEEDED),
				 errmsg("not all databases can have pg_redrive workers"),
				 errdetail("%d databases have the extension, others cannot be looked at.", present),
				 errhint("Increase redrive.max_databases, now %d.", redrive_max_databases)));
		warned = true;
	}
	else if (!any_left_out)
		warned = false;
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
 * An entry with probe set and no pid gets one, unless a session needs the
 * database to itself.  The entry's pid is set by the supervisor; until then
 * retry_at keeps us from starting a second one.
 */
static long
start_supervisors(void)
{
	TimestampTz now = GetCurrentTimestamp();
	long		sleep_ms = SCAN_MS;
	static TimestampTz short_at = 0;	/* last time seen */
	bool		shortage = false;

	for (int i = 0; i < redrive_max_databases; i++)
	{
		RedriveDatabase *entry = &redrive_shared->databases[i];
		Oid			database = InvalidOid;

		LWLockAcquire(redrive_shared->lock, LW_EXCLUSIVE);
		if (OidIsValid(entry->database) && entry->pid == 0 && entry->probe && entry->kept_by == 0)
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
			else
			{
				if (entry->no_process_since == 0)
					entry->no_process_since = now;
				/* not the fault of the database: no longer delay than once */
				entry->retry_at = now + RESTART_US;
				entry->errors--;
				sleep_ms = Min(sleep_ms, RESTART_US / 1000);
				shortage = true;
			}
			LWLockRelease(redrive_shared->lock);
		}
	}
	/* once per condition: again only when it had cleared for a while */
	if (shortage && now - short_at > CLEARED_US)
		ereport(WARNING,
				(errcode(ERRCODE_CONFIGURATION_LIMIT_EXCEEDED),
				 errmsg("could not start a pg_redrive supervisor"),
				 errdetail("There is no free background worker process."),
				 errhint("Increase max_worker_processes, now %d.", max_worker_processes)));
	if (shortage)
		short_at = now;
	return sleep_ms;
}

/* Main function of the launcher process. */
void
redrive_launcher_main(Datum arg)
{
	MemoryContext loop_cxt;
	uint32		wait_event;

	redrive_take_signals(SignalHandlerForShutdownRequest);
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

		pgstat_report_activity(STATE_RUNNING, "redrive: look for databases");
		/* each turn: none is started in a database that has been dropped */
		scan_databases(loop_cxt);
		sleep_ms = start_supervisors();
		pgstat_report_activity(STATE_IDLE, NULL);
		(void) WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH, sleep_ms, wait_event);
		ResetLatch(MyLatch);
	}

	/*
	 * with 0 the postmaster would not start it again after
	 * pg_terminate_backend
	 */
	proc_exit(1);
}
