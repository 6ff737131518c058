/*-------------------------------------------------------------------------
 *
 * compat.h
 *	  Differences between the supported server versions.
 *
 * Every PG_VERSION_NUM test of the code base is here.
 *
 *-------------------------------------------------------------------------
 */
#ifndef REDRIVE_COMPAT_H
#define REDRIVE_COMPAT_H

#include "miscadmin.h"
#include "pgstat.h"
#include "postmaster/bgworker.h"
#include "storage/proc.h"
#include "utils/acl.h"

/* lengths of values: in postgres.h before */
#if PG_VERSION_NUM >= 160000
#include "varatt.h"
#endif

#if PG_VERSION_NUM >= 170000
/* a NOLOGIN role may own handlers */
#define REDRIVE_OWNER_CONNECTION_FLAGS	BGWORKER_BYPASS_ROLELOGINCHECK
#define REDRIVE_OWNER_NEEDS_LOGIN		false
#else
#define REDRIVE_OWNER_CONNECTION_FLAGS	0
#define REDRIVE_OWNER_NEEDS_LOGIN		true
#endif

#if PG_VERSION_NUM >= 170000
#include "utils/wait_event.h"
#define redrive_wait_event(name)	WaitEventExtensionNew(name)
#else
#define redrive_wait_event(name)	PG_WAIT_EXTENSION
#endif

#if PG_VERSION_NUM >= 170000
#define redrive_wait_set(n)		CreateWaitEventSet(NULL, (n))
#else
#define redrive_wait_set(n)		CreateWaitEventSet(TopMemoryContext, (n))
#endif

#if PG_VERSION_NUM >= 180000
#define REDRIVE_MODULE_MAGIC	PG_MODULE_MAGIC_EXT(.name = "pg_redrive", .version = REDRIVE_VERSION)
#else
#define REDRIVE_MODULE_MAGIC	PG_MODULE_MAGIC
#endif

#if PG_VERSION_NUM >= 160000
#include "catalog/pg_proc.h"
#include "catalog/pg_database.h"
#define redrive_may_execute(funcid, role) \
	(object_aclcheck(ProcedureRelationId, (funcid), (role), ACL_EXECUTE) == ACLCHECK_OK)
#define redrive_owns_database(database, role) \
	object_ownercheck(DatabaseRelationId, (database), (role))
#else
#define redrive_may_execute(funcid, role) \
	(pg_proc_aclcheck((funcid), (role), ACL_EXECUTE) == ACLCHECK_OK)
#define redrive_owns_database(database, role) \
	pg_database_ownercheck((database), (role))
#endif

#if PG_VERSION_NUM >= 160000
#define redrive_name_list(text)		stringToQualifiedNameList((text), NULL)
#else
#define redrive_name_list(text)		stringToQualifiedNameList((text))
#endif

#if PG_VERSION_NUM >= 170000
#define redrive_json_lexer(text) \
	makeJsonLexContextCstringLen(NULL, (text), strlen(text), GetDatabaseEncoding(), false)
#else
#define redrive_json_lexer(text) \
	makeJsonLexContextCstringLen((text), strlen(text), GetDatabaseEncoding(), false)
#endif

#if PG_VERSION_NUM >= 160000
#define redrive_insert_index_tuples(result, slot, estate) \
	ExecInsertIndexTuples((result), (slot), (estate), false, false, NULL, NIL, false)
#else
#define redrive_insert_index_tuples(result, slot, estate) \
	ExecInsertIndexTuples((result), (slot), (estate), false, false, NULL, NIL)
#endif

/* from libpq/libpq.h, which cannot be included without the headers of GSSAPI */
extern bool pq_check_connection(void);

#endif							/* REDRIVE_COMPAT_H */
